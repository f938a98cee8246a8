"""Experiment tracking by MLflow: every job is a run."""

from nrcg.tracking.models import _load_module
from nrcg.tracking.reading import charts_url, read_rows
from nrcg.tracking.run import _standard_tags, flatten, log_method_over_scales, run, scale_step
from nrcg.tracking.store import (
    JOURNALS,
    KIND_METHOD,
    KIND_SETTING,
    MAX_PARAM,
    Sync,
    _connect,
    finish_invocation,
    is_left_behind,
    new_invocation,
    sync,
    tracking_uri,
)

__all__ = [
    "JOURNALS",
    "KIND_METHOD",
    "KIND_SETTING",
    "MAX_PARAM",
    "Sync",
    "_connect",
    "_load_module",
    "_standard_tags",
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
    "tracking_uri",
]
