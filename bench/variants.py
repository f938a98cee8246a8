"""Variants of a benchmark measured in turn, each in a process of its own, so that none warms up or crowds another."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def measure_in_turn(
    script: str, variants: Sequence[str], repeats: int, flags: Mapping[str, object]
) -> dict[str, list[dict]]:
    """Variant -> what `script --variant VARIANT` prints as JSON, `repeats` times.

    flags: name -> value of the script's other flags; True: a flag without a value; None or False: left out.
    """
    words = []
    for name, value in flags.items():
        if value is not None and value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    found: dict[str, list[dict]] = {variant: [] for variant in variants}
    for _ in range(repeats):
        for variant in variants:
            command = [sys.executable, script, "--variant", variant, *words]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[variant].append(json.loads(output.splitlines()[-1]))
    return found


def write_json(path: Path | None, summary: object, found: Mapping[str, list[dict]]) -> None:
    """All numbers, where a file is named."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"summary": summary, "runs": found}, indent=2) + "\n")
