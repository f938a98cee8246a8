"""Verbs that train the diffusion model, and share models."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nrcg.cli.arguments import (
    Verbs,
    add_files,
    add_verb,
    choose_device,
    nonnegative,
    positive_or_zero,
)
from nrcg.cli.imports import lean_imports
from nrcg.config import read_step_settings
from nrcg.processes import launched

DTYPES = ("bfloat16", "float16", "float32")


def add_train_ddpm(verbs: Verbs) -> None:
    sub = add_verb(verbs, "train-ddpm", train_ddpm, step=True, compute=True)
    sub.add_argument(
        "--gpus", type=positive_or_zero, help="GPUs that ddpm.num_processes may use; default: all that are visible"
    )
    add_files(sub, data="data/<dataset>", out="models/<experiment>/ddpm")
    sub.add_argument(
        "--preview", type=Path, nargs="+", default=(), help="classifiers; the first that is there guides early samples"
    )
    sub.add_argument("--objective", metavar="NAME", help="one of the grid `objectives` instead of the experiment's own")


def train_ddpm(arguments: argparse.Namespace) -> int | None:
    """Train the diffusion model, or take a pretrained one."""
    from nrcg.devices import resolve_device
    from nrcg.training import distributed

    settings = read_step_settings(arguments.config, "train_ddpm", arguments.experiment, arguments.objective)
    if settings.ddpm.pretrained is None and not launched():
        device = resolve_device(arguments.device or settings.device)
        count = distributed.num_processes(settings.ddpm.num_processes, device, arguments.gpus)
        if count > 1:
            # This very command, in several processes.
            command, leased = ["-m", "nrcg.cli", *arguments.argv], bool(os.environ.get("NRCG_WORKFLOW"))
            return distributed.launch(command, count, device, lease=leased)
    device, precision = choose_device(arguments, settings)
    ranks, device = distributed.join(device)
    with lean_imports():
        from nrcg.steps import train_ddpm as step
    files = {name: getattr(arguments, name) for name in ("data", "out", "preview", "objective")}
    step.train_ddpm(settings, **files, device=device, precision=precision, ranks=ranks)


def add_export_ddpm(verbs: Verbs) -> None:
    sub = add_verb(verbs, "export-ddpm", export_ddpm)
    add_files(sub, ddpm="models/<experiment>/ddpm", out="the new folder")
    sub.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    sub.add_argument("--max-shard-mb", type=nonnegative, default=16.0, help="no file of weights is larger")
    sub.add_argument("--name", help="title of the model card; default: the experiment's")


def export_ddpm(arguments: argparse.Namespace) -> None:
    """Write a diffusion model in half precision and small files, with a model card."""
    import torch

    with lean_imports():
        from nrcg.training.export import export_ddpm
    dtype, most = getattr(torch, arguments.dtype), int(1e6 * arguments.max_shard_mb)
    export_ddpm(arguments.ddpm, arguments.out, dtype=dtype, max_shard_bytes=most, name=arguments.name)


def add_export_classifier(verbs: Verbs) -> None:
    sub = add_verb(verbs, "export-classifier", export_classifier)
    add_files(sub, classifier="models/<experiment>/classifiers/<role>", out="the new folder")
    sub.add_argument("--dtype", choices=DTYPES, default="float16")


def export_classifier(arguments: argparse.Namespace) -> None:
    """Write a classifier in half precision."""
    import torch

    from nrcg.training.export import export_classifier

    export_classifier(arguments.classifier, arguments.out, dtype=getattr(torch, arguments.dtype))
