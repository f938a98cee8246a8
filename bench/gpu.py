"""Training and guidance of the paper's U-Net on one GPU, each variant against the plain published one, in one table.

    python bench/gpu.py --json gpu.json             # about five minutes
    python bench/gpu.py --small                     # guidance in batches of 8, as CUDA graphs too
    python bench/gpu.py --toy                       # tries the benchmark itself on a CPU

Each measurement is a process of its own (`guidance_speed.py`, `training_speed.py`, which say what "plain" is). All
variants of a round run one after the other, and ratios are taken within a round; rounds go on until the minutes are
over, at least one. What is compiled is kept between the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
VARIANTS = {
    "guidance": ("plain", "full", "half_weights", "compiled", "compiled_half_weights"),
    "training": ("plain_workers", "ours", "compiled"),
}
"""Benchmark -> variants, the plain one first."""
SMALL = {"guidance": ("plain", "full", "half_weights", "compiled_half_weights", "graphs_half_weights")}
SMALL_FLAGS = {"guidance": ("--batch-size", "8", "--steps", "48")}
FLAGS = {"guidance": ("--batch-size", "256", "--steps", "24"), "training": ("--batch-size", "128", "--seconds", "6")}
TOY = {
    "guidance": ("--batch-size", "1", "--steps", "1", "--size", "16", "--toy"),
    "training": ("--batch-size", "4", "--seconds", "0.2", "--size", "16", "--toy"),
}


def run(kind: str, variant: str, flags: tuple[str, ...]) -> dict:
    """What one process measured."""
    command = [sys.executable, str(HERE / f"{kind}_speed.py"), "--variant", variant, *flags]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def table(found: dict[tuple[str, str], list[dict]]) -> str:
    """Markdown: speed, ratio to the plain variant of the same round (the first), share of the peak, memory."""
    lines = [
        "| | variant | images/s (median) | times plain (min to max) | share of peak | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    for (kind, variant), runs in found.items():
        plain = [one["images_per_second"] for one in found[kind, VARIANTS[kind][0]]]
        ratios = [one["images_per_second"] / base for one, base in zip(runs, plain, strict=False)]
        speed = statistics.median(one["images_per_second"] for one in runs)
        shares = [one["share_of_peak"] for one in runs if "share_of_peak" in one]
        used = f"{100 * statistics.median(shares):.1f} %" if shares else ""
        peak = statistics.median(one["peak_mib"] for one in runs)
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {kind} | {variant} | {speed:.4g} | {ratio} | {used} | {peak:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4.0, help="no new round after so many")
    parser.add_argument("--small", action="store_true", help="guidance alone, in batches of 8")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to try the benchmark itself")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    arguments = parser.parse_args()
    kinds, flags = (SMALL, SMALL_FLAGS) if arguments.small else (VARIANTS, FLAGS)
    flags, end = TOY if arguments.toy else flags, time.monotonic() + 60 * arguments.minutes
    found: dict[tuple[str, str], list[dict]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        while not found or time.monotonic() < end:
            for kind, variants in kinds.items():
                for variant in variants:
                    began = time.monotonic()
                    found[kind, variant].append(run(kind, variant, flags[kind]))
                    print(f"{kind} {variant}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            if arguments.toy:
                break
    print(table(found))
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"\n{device}; torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}")
    if arguments.json is not None:
        runs = {f"{kind} {variant}": entries for (kind, variant), entries in found.items()}
        arguments.json.write_text(json.dumps(runs, indent=2) + "\n")


if __name__ == "__main__":
    main()
