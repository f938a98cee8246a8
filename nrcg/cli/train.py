"""Verbs that make models, and share them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nrcg.cli.arguments import (
    Verbs,
    add_verb,
    choose_device,
    nonnegative,
    positive_or_zero,
    quiet_diffusers,
    read_settings,
)
from nrcg.config import ROLES
from nrcg.processes import launched


def add_train_ddpm(verbs: Verbs) -> None:
    sub = add_verb(verbs, "train-ddpm", train_ddpm, step=True, compute=True)
    sub.add_argument(
        "--gpus", type=positive_or_zero, help="GPUs that ddpm.num_processes may use; default: all that are visible"
    )
    sub.add_argument("--data", required=True, help="data/<dataset>")
    sub.add_argument("--out", required=True, help="models/<experiment>/ddpm")


def train_ddpm(arguments: argparse.Namespace) -> int | None:
    """Train the diffusion model, or take a pretrained one."""
    from nrcg.devices import resolve_device
    from nrcg.steps import train_ddpm as step
    from nrcg.training import distributed

    settings = read_settings(arguments, "train_ddpm")
    if settings.ddpm.pretrained is None and not launched():
        device = resolve_device(arguments.device or settings.device)
        count = distributed.num_processes(settings.ddpm.num_processes, device, arguments.gpus)
        if count > 1:
            # This very command, in several processes.
            command, leased = ["-m", "nrcg.cli", *arguments.argv], bool(os.environ.get("NRCG_WORKFLOW"))
            return distributed.launch(command, count, device, lease=leased)
    device, precision = choose_device(arguments, settings)
    ranks, device = distributed.join(device)
    quiet_diffusers()
    step.train_ddpm(
        settings,
        data=Path(arguments.data),
        out=Path(arguments.out),
        device=device,
        precision=precision,
        ranks=ranks,
    )


def add_train_classifier(verbs: Verbs) -> None:
    sub = add_verb(verbs, "train-classifier", train_classifier, step=True, compute=True)
    sub.add_argument("--role", choices=ROLES, help="which of the experiment's classifiers")
    sub.add_argument("--data", required=True, help="data/<dataset>")
    sub.add_argument("--out", required=True, help="models/<experiment>/classifiers/<role>")


def train_classifier(arguments: argparse.Namespace) -> None:
    """Train one classifier, or take a pretrained one."""
    from nrcg.steps import train_classifier as step

    settings = read_settings(arguments, "train_classifier", arguments.role)
    device, precision = choose_device(arguments, settings)
    step.train_classifier(
        settings, data=Path(arguments.data), out=Path(arguments.out), device=device, precision=precision
    )


def add_export_ddpm(verbs: Verbs) -> None:
    sub = add_verb(verbs, "export-ddpm", export_ddpm)
    sub.add_argument("--ddpm", required=True, help="models/<experiment>/ddpm")
    _add_export_arguments(sub, dtype="bfloat16")
    sub.add_argument("--max-shard-mb", type=nonnegative, default=16.0, help="no file of weights is larger")
    sub.add_argument("--name", help="title of the model card; default: the experiment's")


def export_ddpm(arguments: argparse.Namespace) -> None:
    """Write a diffusion model in half precision and small files, with a model card."""
    import torch
    from diffusers.utils import logging

    from nrcg.training.export import export_ddpm

    logging.disable_progress_bar()
    dtype, most = getattr(torch, arguments.dtype), int(1e6 * arguments.max_shard_mb)
    export_ddpm(arguments.ddpm, arguments.out, dtype=dtype, max_shard_bytes=most, name=arguments.name)


def add_export_classifier(verbs: Verbs) -> None:
    sub = add_verb(verbs, "export-classifier", export_classifier)
    sub.add_argument("--classifier", required=True, help="models/<experiment>/classifiers/<role>")
    _add_export_arguments(sub, dtype="float16")


def export_classifier(arguments: argparse.Namespace) -> None:
    """Write a classifier in half precision."""
    import torch

    from nrcg.training.export import export_classifier

    export_classifier(arguments.classifier, arguments.out, dtype=getattr(torch, arguments.dtype))


def _add_export_arguments(sub: argparse.ArgumentParser, *, dtype: str) -> None:
    sub.add_argument("--out", required=True, help="the new folder")
    sub.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default=dtype)
