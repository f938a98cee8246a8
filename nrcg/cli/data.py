"""The verb that brings data in."""

from __future__ import annotations

import argparse
from pathlib import Path

from nrcg.cli.arguments import Verbs, add_verb, positive, read_settings


def add_dataset(verbs: Verbs) -> None:
    sub = add_verb(verbs, "dataset", dataset, step=True)
    sub.add_argument("--out", required=True, help="data/<dataset>")
    sub.add_argument("--threads", type=positive, help="CPU threads")


def dataset(arguments: argparse.Namespace) -> None:
    """Make a data set: draw it, or read, check and convert raw images."""
    from nrcg.steps.dataset import make_dataset

    make_dataset(read_settings(arguments, "dataset"), out=Path(arguments.out), workers=arguments.threads)
