"""What the verbs share: types of arguments, their settings, their device."""

from __future__ import annotations

import argparse
import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from nrcg.cli.imports import import_step
from nrcg.config import StepSettings, checked_device, read_step_settings
from nrcg.errors import ConfigError, NrcgError

if TYPE_CHECKING:
    import torch

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""Where a module declares its verbs."""


def add_verb(
    verbs: Verbs, name: str, verb: Callable, *, text: str | None = None, step: bool = False, compute: bool = False
) -> argparse.ArgumentParser:
    """The parser of one verb.

    Args:
        text: what it does; None: the docstring of its function.
        step: it is a step of the pipeline: --config and --experiment.
        compute: it computes with torch: --device and --threads.
    """
    text = text or verb.__doc__ or ""
    sub = verbs.add_parser(name, help=text.splitlines()[0], description=text)
    sub.set_defaults(verb=verb)
    if step:
        sub.add_argument("--config", required=True, help="config.yaml, or a step's settings file")
        sub.add_argument("--experiment", help="which experiment of config.yaml")
    if compute:
        sub.add_argument("--device", type=device_flag, help="auto, cpu, cuda, cuda:N; default: the config's")
        sub.add_argument("--threads", type=positive, help="CPU threads")
    return sub


def device_flag(text: str) -> str:
    """Type of an argument: auto, cpu, cuda or cuda:N."""
    try:
        return checked_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    """Type of an argument: a whole number >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number >= 1")
    return int(text)


def positive_or_auto(text: str) -> int | str:
    """Type of an argument: a whole number >= 1, or auto."""
    return text if text == "auto" else positive(text)


def positive_or_zero(text: str) -> int:
    """Type of an argument: a whole number >= 0."""
    return 0 if text == "0" else positive(text)


def nonnegative(text: str) -> float:
    """Type of an argument: a finite number >= 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number >= 0")
    return value


def fraction(text: str) -> float:
    """Type of an argument: a number in [0, 1]."""
    value = nonnegative(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is not in 0..1")
    return value


def add_files(sub: argparse.ArgumentParser | argparse._ArgumentGroup, required: bool = True, **files: str) -> None:
    """A flag for each file or folder, by name -> help."""
    for name, text in files.items():
        sub.add_argument(f"--{name}", type=Path, required=required, help=text)


def add_method(sub: argparse._ArgumentGroup) -> None:
    """The flags that name a method of an experiment, where a verb also serves without."""
    sub.add_argument("--config", help="config.yaml, or a step's settings file")
    sub.add_argument("--experiment", help="which experiment of config.yaml")
    sub.add_argument("--method", help="a key of methods")


def run_step(
    arguments: argparse.Namespace, function: str, step: str, part: str | None = None, compute: bool = True
) -> Any:
    """Call a function of nrcg.steps with its step's settings, and with the flags that are named like its parameters.

    Args:
        function: MODULE.NAME in nrcg.steps.
        step: A key of `nrcg.config.STEPS`.
        part: The role or method that the settings are of.
        compute: Whether it computes with torch.
    """
    module, _, name = function.partition(".")
    settings = read_step_settings(arguments.config, step, arguments.experiment, part)
    call = getattr(import_step(module, compute), name)
    parameters = inspect.signature(call).parameters
    given = {name: value for name, value in vars(arguments).items() if name in parameters and value is not None}
    if "device" in parameters:
        device, precision = choose_device(arguments, settings)
        given |= {"device": device} | ({"precision": precision} if "precision" in parameters else {})
    return call(settings, **given)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def choose_device(arguments: argparse.Namespace, settings: StepSettings | None) -> tuple[torch.device, torch.dtype]:
    """Device and precision: the flags', else the settings', else auto and float32."""
    from nrcg.devices import acquire_device, resolve_precision

    device = acquire_device(arguments.device or getattr(settings, "device", "auto"), arguments.threads)
    precision = getattr(arguments, "precision", None) or getattr(settings, "precision", "float32")
    weights = getattr(arguments, "unet_weights", None) or getattr(settings, "unet_weights", None)
    training = getattr(settings, "TRAINS", False)
    return device, resolve_precision(precision, device, training=training, unet_weights=weights)


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """What the library refuses about a setting or a model becomes a user's mistake."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if isinstance(error, NrcgError):
            raise
        raise ConfigError(" ".join(str(error).split())) from error
