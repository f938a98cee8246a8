"""What a job keeps of its speed where other processes work on the same cores, by OpenMP's wait policy.

    python bench/shared_cores.py

Threads that spin while they wait for each other (OMP_WAIT_POLICY=ACTIVE, like GNU OpenMP's default) lose most of their
speed to a neighbour; those that sleep (PASSIVE, what every nrcg verb sets before torch loads) share the cores. The job
samples by the quickstart's U-Net with one thread per core. Prints images/s, the median of a few runs of each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

JOB = """
import sys, time, torch
from nrcg.config import get_experiment, load
from nrcg.diffusion.unet import build_unet
settings = get_experiment(load("config.yaml"), "quickstart")
torch.set_num_threads(int(sys.argv[1]))
unet = build_unet(settings.ddpm.unet, settings.dataset.image_size, 3).eval()
x, t = torch.randn(32, 3, settings.dataset.image_size, settings.dataset.image_size), torch.zeros(32, dtype=torch.long)
with torch.no_grad():
    unet(x, t)
    began, passes = time.perf_counter(), 0
    while time.perf_counter() - began < float(sys.argv[2]):
        unet(x, t)
        passes += 1
print(passes * len(x) / (time.perf_counter() - began))
"""


def images_per_second(policy: str, neighbours: int, threads: int, seconds: float) -> float:
    """U-Net passes of one image per second, beside so many busy processes."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(neighbours)]
    try:
        job = subprocess.run(
            [sys.executable, "-c", JOB, str(threads), str(seconds)],
            env=os.environ | {"OMP_WAIT_POLICY": policy},
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return float(job.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{arguments.threads} threads; images/s, median of {arguments.repeats}")
    print("busy neighbours  ACTIVE  PASSIVE  ratio")
    for neighbours in range(arguments.threads + 1):
        rates: dict[str, list[float]] = {"ACTIVE": [], "PASSIVE": []}
        for _ in range(arguments.repeats):
            for policy, found in rates.items():  # in turn, so that a drifting machine favours neither
                found.append(images_per_second(policy, neighbours, arguments.threads, arguments.seconds))
        active, passive = (statistics.median(found) for found in rates.values())
        print(f"{neighbours:15}  {active:6.0f}  {passive:7.0f}  {passive / active:5.2f}", flush=True)


if __name__ == "__main__":
    main()
