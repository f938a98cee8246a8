"""Experiment tracking by MLflow: every job is a run, journalled on disk before it is sent."""

from nrcg.tracking.invocations import new_invocation
from nrcg.tracking.reading import KIND_METHOD, charts_url, read_rows
from nrcg.tracking.runs import Run, flatten, log_method_over_scales, run, scale_step
from nrcg.tracking.sending import Sync, finish_invocation, is_left_behind, sync

__all__ = [
    "KIND_METHOD",
    "Run",
    "Sync",
    "charts_url",
    "finish_invocation",
    "flatten",
    "is_left_behind",
    "log_method_over_scales",
    "new_invocation",
    "read_rows",
    "run",
    "scale_step",
    "sync",
]
