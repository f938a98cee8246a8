"""The published comparison on SportBalls, 64 x 64, on one large GPU in minutes: models, figs. 1 to 8, table 2, speed.

    python bench/paper_size.py --out OUT --init FOLDER      # again with the same words: goes on where it stopped
    python bench/paper_size.py --out OUT --toy              # all of it at toy size on a CPU, one to two minutes

    stage    minutes  what
    train    5        data set; the paper's U-Net, as long as the time allows; both guides and the judge
    sweep    3.5      fig. 8: eight methods, two or three scales, 256 samples each, half of the steps (preset `fast`)
    best     2        table 2: unconditional, robust, EMA 0.99 at their best scales, the published 400 steps
    forward  1.3      figs. 1 to 4 on 256 validation images
    speed    3        bench/gpu.py: training and guidance against plain loops, share of the peak

A call ends within --minutes, and exits with 3 where another one has something left to do. Every result is a file,
written whole, and what is there is not made again; a training goes on from its checkpoint. Each stage begins nothing
that would outlast its minutes, by the pace measured so far; they are totals over all calls. What a call has left when
all stages had theirs goes to `best`, to `sweep`, to `speed`. OUT holds results.md, tables/, figures/, speed.json and
ddpm/ (bfloat16, files below 16 MB, a card); OUT/work is large: data, samples, classifiers, checkpoints.

Needs the base installation alone; figures are left out, with a note, where matplotlib is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

from paper_size_run import BUDGETS, OutOfTime, Run  # noqa: E402

LEFT_OVERS = ("best", "sweep", "forward", "speed")
"""Stages that get what a call has left, in this order."""
AGAIN = 3
"""Exit code: another call has something left to do."""
REPORT_SECONDS = 30.0
"""Of a call, for the tables, the figures and the page."""


def worker(run: Run) -> int:
    """All stages; returns 0 where nothing is left, AGAIN where time was short, 1 where something failed."""
    from paper_size_stages import STAGES

    os.chdir(run.work)  # where the steps keep their caches
    run.state["device"] = _device_record(run)
    whole: dict[str, bool] = {}
    run.state |= {"whole": whole, "failures": {}}
    try:
        for stage in BUDGETS:
            whole[stage] = STAGES[stage](run)
            run.save()
        run.left_overs = True
        for stage in LEFT_OVERS:
            whole[stage] = whole[stage] or STAGES[stage](run)
            run.save()
    except OutOfTime as error:
        print(f"out of time: {error}", flush=True)
        return AGAIN
    return 1 if run.state["failures"] else 0 if all(whole.values()) else AGAIN


def _device_record(run: Run) -> dict[str, str]:
    """The machine, for the page."""
    import platform

    import torch

    from nrcg.devices import device_name
    from nrcg.provenance import versions

    record = {"device": device_name(run.device()), "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores"}
    return record | versions() | {"cuda": str(torch.version.cuda)}


def supervise(argv: Sequence[str], arguments: argparse.Namespace) -> int:
    """The stages in a process that can be ended in time, then the page of what there is."""
    seconds = 60 * arguments.minutes - (5.0 if arguments.toy else REPORT_SECONDS)
    command = [sys.executable, str(Path(__file__).resolve()), *argv, "--worker", f"{time.time() + seconds:.0f}"]
    environment = os.environ | {"NRCG_TRACKING": "off", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(arguments.out.resolve() / "work" / "compiled")
    if arguments.toy:
        environment["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(AGAIN))  # so that `finally` ends the worker too
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = AGAIN
    finally:
        # With whatever it has started.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    from paper_size_page import write_page

    whole = write_page(Run(arguments, time.monotonic()), code)
    print(f"{arguments.out}/results.md; {'all done' if code == 0 else f'exit code {code}: {whole}'}", flush=True)
    return code


def _budget(text: str) -> tuple[str, float]:
    """Type of an argument: STAGE=MINUTES."""
    stage, _, minutes = text.partition("=")
    if stage not in BUDGETS:
        raise argparse.ArgumentTypeError(f"{text!r} is no STAGE=MINUTES; stages: {', '.join(BUDGETS)}")
    return stage, float(minutes)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; OUT/work is large")
    parser.add_argument("--minutes", type=float, default=9.5, help="the call ends within; default: %(default)s")
    parser.add_argument(
        "--budget", type=_budget, action="append", default=[], metavar="STAGE=MINUTES", help="of a stage; again"
    )
    parser.add_argument("--samples", type=int, default=1024, help="of table 2, in the end; default: %(default)s")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--init", type=Path, help="a diffusion model whose weights the training starts from")
    source.add_argument("--pretrained", type=Path, help="a diffusion model that takes the training's place")
    parser.add_argument("--compile", choices=("off", "auto"), default="off", help="networks; auto: in long jobs")
    parser.add_argument("--commit", help="of the code, where it is no checkout of git")
    parser.add_argument("--toy", action="store_true", help="toy size, on any machine")
    parser.add_argument("--beside", action="store_true", help="train side by side on a CPU too")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)  # ends by this time
    return parser.parse_args(argv)


def main() -> int:
    arguments = parse()
    if arguments.worker is None:
        return supervise(sys.argv[1:], arguments)
    return worker(Run(arguments, time.monotonic() + arguments.worker - time.time()))


if __name__ == "__main__":
    sys.exit(main())
