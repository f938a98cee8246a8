"""Faults of a whole run: kills, damaged files, a full disk, two at once, an edited configuration.

After each of them one plain rerun ends with what an undisturbed run ends with.
"""

import base64
import contextlib
import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from workflow_runs import command, copy_tree, planned, processes_in

from nrcg import config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]

KILLS = 32
TOY = {
    # Long enough to be hit, with a checkpoint every few steps.
    "ddpm": {"epochs": 8, "checkpoint_minutes": 1e-3, "sample_every": 0},
    "classifiers": {"robust": {"epochs": 4, "checkpoint_minutes": 1e-3}},
    "sampling": {"num_samples": 8, "shard_size": 4},
    "sweep": {"non_robust_x0_ema99": [1]},
}
EDITED = {"non_robust_x0_ema99": {"stabilizer": {"beta": 0.5}}}
VOLATILE = (
    "seconds",
    "seconds_lo",
    "seconds_hi",
    "images_per_second",
    "peak_memory_mib",
    "mlflow_run_id",
    "record_sha256",
)
"""What no two runs have in common: times, memory, names of runs."""
WAYS = ("counterfactual", "nearest")
CELLS = ("epsilon-simple", "v_prediction-simple")
TABLES = (
    ("results/toy/metrics.csv", "results/toy/summary.json"),
    ("results/toy/likelihood/",),
    ("results/toy/objectives/",),
    ("results/toy/explanations/",),
)
"""Prefixes of what each table's job writes, beside what it is made of."""
STAGES = (
    ("data/",),
    ("models/",),
    (
        *("results/toy/forward.csv", "results/toy/reference.json", "results/toy/samples/"),
        *("results/toy/likelihood/shard", *(f"results/toy/explanations/{way}/" for way in WAYS)),
    ),
    (
        *("results/toy/metrics/", *(f"results/toy/explanations/{way}." for way in WAYS)),
        *(f"results/toy/objectives/{cell}." for cell in CELLS),
    ),
    tuple(prefix for table in TABLES for prefix in table),
    ("results/toy/figures/",),
    ("results/toy/report.html", "results/toy/paper_comparison.md"),
)
"""Prefixes of the results, each stage made of those before it; the first that fits counts."""

WEIGHTS = (1, 2, 8, 5, 2, 2, 2)
"""How often a stage's results are lost, so that each has its share of the kills: what is lost early takes long."""


def configure(tree: Path, methods: dict | None = None) -> None:
    change = {"experiments": {"toy": TOY}} | ({"methods": methods} if methods else {})
    (tree / "change.json").write_text(json.dumps(change))


def start(tree: Path, *arguments: str) -> subprocess.Popen:
    """Snakemake on the toy experiment, in a process group of its own; what it says goes to said.txt."""
    with open(tree / "said.txt", "a") as said:
        return subprocess.Popen(
            command("toy", "--cores", "2", *arguments, "--configfile", "toy.yaml", "change.json"),
            cwd=tree,
            env=os.environ | {"NRCG_TRACKING": "off"},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def rerun(tree: Path, *arguments: str) -> str:
    """One plain rerun, which must succeed; what it said."""
    (tree / "said.txt").write_text("")
    code = start(tree, *arguments).wait()
    said = (tree / "said.txt").read_text()
    assert code == 0, said[-5000:]
    return said


def relative(tree: Path) -> list[Path]:
    """Every result, unfinished ones too."""
    folders = [tree / name for name in ("data", "models", "results")]
    return sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())


def stage(name: str) -> int:
    return next(number for number, prefixes in enumerate(STAGES) if name.startswith(prefixes))


def steady(value: object) -> object:
    """JSON without what no two runs have in common."""
    if isinstance(value, dict):
        return {key: steady(entry) for key, entry in value.items() if key not in VOLATILE}
    return [steady(entry) for entry in value] if isinstance(value, list) else value


def content(path: Path) -> str:
    """A result's content, without what no two runs have in common."""
    if path.suffix == ".json":
        return json.dumps(steady(json.loads(path.read_text())), sort_keys=True)
    if path.suffix == ".csv":
        with open(path, newline="") as file:
            return json.dumps([steady(row) for row in csv.DictReader(file)])
    if path.suffix == ".html":
        return "report"  # holds times and memory
    if path.suffix == ".npz" and "explanations" in path.parts:
        arrays = sorted(np.load(path).items())
        return str([(name, array.tobytes()) for name, array in arrays if not name.endswith("seconds")])
    return hashlib.sha256(path.read_bytes()).hexdigest()


def results(tree: Path) -> dict[str, str]:
    """Name -> content of every result. Nothing unfinished may lie among them, nor what was set aside."""
    found = {path.relative_to(tree).as_posix(): path for path in relative(tree)}
    return {name: content(path) for name, path in found.items() if not name.endswith((".lock", ".damaged"))}


def whole(tree: Path) -> dict[str, tuple[int, int]]:
    """Name -> (inode, time of change) of the results that Snakemake takes for whole."""
    marks = (tree / ".snakemake" / "incomplete").rglob("*")
    unfinished = set()
    for mark in marks:
        if mark.is_file() and mark.name not in ("migration_underway",):
            name = mark.relative_to(tree / ".snakemake" / "incomplete").as_posix().replace("/", "").replace("@", "")
            with contextlib.suppress(ValueError):
                unfinished.add(base64.b64decode(name, altchars=b"_-").decode())
    found = {}
    for path in relative(tree):
        name = path.relative_to(tree).as_posix()
        if path.name.startswith(".") or name.endswith((".pt", ".partial", ".tmp")) or name in unfinished:
            continue
        # A folder with an unfinished file is one job's work.
        if not any(other.startswith(group(name)) and stage(other) == stage(name) for other in unfinished):
            found[name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def group(name: str) -> tuple[str, ...]:
    """What one job writes, as prefixes of names of its stage."""
    parts = name.split("/")
    if parts[0] == "data":
        return ("data/",)
    if parts[0] == "models":
        return ("/".join(parts[: 3 if parts[2] == "ddpm" else 4]) + "/",)
    if stage(name) in (2, 3):
        return (name.rsplit(".", 1)[0] + ".",)
    return next((table for table in TABLES if name.startswith(table)), STAGES[stage(name)])


def alone(tree: Path, seconds: float = 20.0) -> None:
    """No process works in the tree any more, after some seconds at most."""
    deadline = time.monotonic() + seconds
    while processes_in(tree) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_in(tree) == []


def jobs_in(tree: Path) -> list[int]:
    """Numbers of the processes of the jobs at work in a tree."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if (entry / "cwd").resolve() == tree.resolve() and any(word.endswith(b"/nrcg") for word in words[:2]):
                found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A tree after an undisturbed run."""
    tree = copy_tree(tmp_path_factory.mktemp("undisturbed"))
    configure(tree)
    rerun(tree)
    return tree


@pytest.fixture
def finished(undisturbed, tmp_path) -> Path:
    """A copy of that tree, in which Snakemake has nothing to do."""
    return Path(shutil.copytree(undisturbed, tmp_path / "tree", symlinks=True))


def test_thirty_kills_at_random_moments(finished, undisturbed):
    """Before a run, one job's results are lost, of a random stage. Kills hit jobs of every stage, Snakemake within its
    planning and within its jobs, and all of them at once."""
    tree, seed = finished, int(os.environ.get("NRCG_FAULTS_SEED", 0))
    rng = random.Random(seed)
    kills: list[str] = []
    since = [0] * len(STAGES)  # when what came before a stage was lost: what is older must be made anew
    expected: dict[str, tuple[int, int]] = {}
    code = 0
    while len(kills) < KILLS:
        now = whole(tree)
        if now and (code == 0 or rng.random() < 0.3):
            levels = sorted({stage(name) for name in now})
            (level,) = rng.choices(levels, [WEIGHTS[level] for level in levels])
            lost = group(rng.choice(sorted(name for name in now if stage(name) == level)))
            for name in [name for name in now if name.startswith(lost) and stage(name) == level]:
                (tree / name).unlink()
                del now[name]
            since[level + 1 :] = [time.time_ns()] * (len(STAGES) - level - 1)
        expected = {name: state for name, state in now.items() if state[1] > since[stage(name)]}
        run = start(tree)
        kind = ""
        while kind in ("", "job") and run.poll() is None and len(kills) < KILLS:
            deadline, planning = time.monotonic() + 60, not kind and rng.random() < 0.2
            while run.poll() is None and not planning and not jobs_in(tree) and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 4 if planning else 9))
            kind, jobs = rng.choice(("job", "job", "snakemake", "group")), jobs_in(tree)
            if run.poll() is not None or (kind == "job" and not jobs):
                continue
            with contextlib.suppress(ProcessLookupError):
                target = rng.choice(jobs) if kind == "job" else run.pid
                what = Path(f"/proc/{target}/cmdline").read_bytes().split(b"\0")[2].decode() if kind == "job" else kind
                (os.killpg if kind == "group" else os.kill)(target, signal.SIGKILL)
                kills.append(what)
        if len(kills) == KILLS and run.poll() is None:
            run.kill()
        code = run.wait()
        alone(tree)
        check_kept(tree, expected)
    print(f"{len(kills)} kills, seed {seed}: {', '.join(kills)}")
    expected = {name: state for name, state in whole(tree).items() if state[1] > since[stage(name)]}
    rerun(tree)
    alone(tree)
    check_kept(tree, expected)
    assert results(tree) == results(undisturbed)
    (tree / "said.txt").write_text("")
    start(tree, "--dry-run").wait()
    assert planned((tree / "said.txt").read_text()) == {}


def check_kept(tree: Path, expected: dict[str, tuple[int, int]]) -> None:
    """What was whole was not made again."""
    now = whole(tree)
    assert {name: now.get(name) for name in expected} == expected


def flip(path: Path, where: bytes | None = None) -> None:
    """Flip a bit: of the last byte, or of the first after some text."""
    content = bytearray(path.read_bytes())
    content[-1 if where is None else content.index(where) + len(where)] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damaged_shards_are_made_anew_by_one_plain_rerun(finished, undisturbed):
    samples = finished / "results/toy/samples"
    cut(samples / "unconditional/scale0/shard0000.npy")
    flip(samples / "unconditional/scale0/shard0001.npy")
    flip(samples / "non_robust_x0_ema99/scale1/shard0000.json", b'"seed": ')
    before = whole(finished)
    said = rerun(finished)
    assert said.count("set aside as") == 3
    assert results(finished) == results(undisturbed)
    after = whole(finished)
    kept = [name for name in before if name.startswith(("data/", "models/")) or name.endswith("scale1/shard0001.npy")]
    assert len(kept) > 20
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


@pytest.mark.parametrize(
    "name, damage",
    [
        ("data/toyballs/dataset.json", lambda path: path.write_bytes(b"")),
        ("data/toyballs/val/labels.npy", flip),
        ("models/toy/ddpm/training.json", lambda path: flip(path, b'"seed": ')),
        ("models/toy/ddpm/unet/diffusion_pytorch_model.safetensors", flip),
        ("models/toy/classifiers/judge/config.json", lambda path: path.write_bytes(b"")),
        ("models/toy/classifiers/robust/model.safetensors", flip),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_data_and_models_are_refused_and_the_remedy_helps(finished, undisturbed, name, damage):
    """Nothing is deleted, also by a dry run; the printed command makes the file anew."""
    damage(finished / name)
    before = whole(finished)
    for flags in ((), ("--dry-run",)):
        (finished / "said.txt").write_text("")
        assert start(finished, *flags).wait() == 1
        (line,) = [line for line in (finished / "said.txt").read_text().splitlines() if line.startswith("nrcg: ")]
        assert line.startswith(f"nrcg: {name}: damaged (")
        assert whole(finished) == before
    shell = f"{line.split(' anew with all that belongs to it: ')[1]} --configfile toy.yaml change.json"
    environment = os.environ | {"NRCG_TRACKING": "off"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(shell, shell=True, cwd=finished, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rerun(finished)
    assert results(finished) == results(undisturbed)


@pytest.mark.parametrize(
    "record, file",
    [
        ("data/toyballs/dataset.json", "train/images.npy"),
        ("models/toy/ddpm/training.json", "unet/diffusion_pytorch_model.safetensors"),
        ("models/toy/classifiers/judge/config.json", "model.safetensors"),
    ],
)
def test_what_a_kill_before_the_record_leaves_is_made_anew(finished, undisturbed, record, file):
    """New files whose record is not there yet are no damage."""
    (finished / record).unlink()
    flip((finished / record).parent / file)
    rerun(finished)
    assert results(finished) == results(undisturbed)


def test_a_damaged_trace_is_drawn_anew_with_its_shard(finished):
    """Its twin, which is whole, stays."""
    change = {"experiments": {"toy": TOY | {"sampling": TOY["sampling"] | {"trace": True}}}}
    (finished / "change.json").write_text(json.dumps(change))
    rerun(finished)
    before, kept = results(finished), whole(finished)
    folder = "results/toy/samples/non_robust_x0_ema99/scale1"
    flip(finished / folder / "shard0001.trace.npz")
    assert rerun(finished).count("set aside as") == 1
    assert results(finished) == before
    assert whole(finished)[f"{folder}/shard0000.npy"] == kept[f"{folder}/shard0000.npy"]


def test_a_shard_of_another_method_is_refused_and_the_remedy_helps(finished, undisturbed):
    samples = finished / "results/toy/samples"
    stale = samples / "non_robust_x0_ema99/scale1/shard0001.npy"
    for path in (stale, stale.with_suffix(".json")):
        shutil.copy(samples / "unconditional/scale0" / path.name, path)
    (finished / "said.txt").write_text("")
    assert start(finished).wait() != 0
    log = (finished / "logs/toy/evaluate_non_robust_x0_ema99.log").read_text()
    (line,) = [line for line in log.splitlines() if line.startswith("nrcg: ")]
    name = stale.relative_to(finished).as_posix()
    assert line.startswith(f"nrcg: {name}: was made by another method")
    assert line.endswith(f"make it anew: rm {name} && snakemake {name} --cores all --resources gpu=1")
    stale.unlink()
    rerun(finished)
    assert results(finished) == results(undisturbed)


def test_a_kill_of_nrcg_run_leaves_no_process_and_the_same_command_goes_on(undisturbed, tmp_path):
    tree = copy_tree(tmp_path)
    own = config.read_yaml(tree / "config.yaml")
    for change in (config.read_yaml(tree / "toy.yaml"), {"experiments": {"toy": TOY}}):
        own = config.merge(own, change)
    (tree / "config.yaml").write_text(yaml.safe_dump(own, sort_keys=False))

    def run() -> subprocess.Popen:
        command = [sys.executable, "-m", "nrcg.cli", "run", "toy"]
        environment = os.environ | {"NRCG_TRACKING": "off"}
        with open(tree / "said.txt", "a") as said:
            return subprocess.Popen(command, cwd=tree, env=environment, stdout=said, stderr=subprocess.STDOUT)

    for word in (" train-ddpm ", " sample "):
        running = run()
        wait_for_job(tree, running, word)
        running.kill()
        running.wait()
        alone(tree)
    assert run().wait() == 0, (tree / "said.txt").read_text()[-3000:]
    assert results(tree) == results(undisturbed)


def wait_for_job(tree: Path, run: subprocess.Popen, word: str) -> None:
    """Until a job whose command line holds a word is at work."""
    deadline = time.monotonic() + 300
    while not any(word in line for line in processes_in(tree)):
        assert run.poll() is None and time.monotonic() < deadline, (tree / "said.txt").read_text()[-3000:]
        time.sleep(0.05)


def test_a_second_snakemake_is_refused_and_harms_nothing(finished, undisturbed):
    (finished / "results/toy/forward.csv").unlink()
    run = start(finished)
    wait_for_job(finished, run, " forward ")
    run.send_signal(signal.SIGSTOP)  # until the others have looked, however slow they are
    locks = {path.name for path in (finished / ".snakemake/locks").iterdir()}
    assert locks
    words = command("toy", "--cores", "1", "--configfile", "toy.yaml", "change.json")
    second = subprocess.run(words, cwd=finished, capture_output=True, text=True)
    assert second.returncode != 0
    assert "Directory cannot be locked" in second.stdout + second.stderr
    dry = subprocess.run([*words, "--dry-run"], cwd=finished, capture_output=True, text=True)
    assert dry.returncode == 0
    assert {path.name for path in (finished / ".snakemake/locks").iterdir()} == locks
    run.send_signal(signal.SIGCONT)
    assert run.wait() == 0
    assert results(finished) == results(undisturbed)


def test_a_configuration_edited_half_way(finished, undisturbed, tmp_path):
    """Jobs keep the settings they were planned with; the rerun makes anew what the edit changes."""
    edited = Path(shutil.copytree(finished, tmp_path / "edited", symlinks=True))
    shutil.rmtree(finished / "results/toy/samples/non_robust_x0_ema99")
    (finished / "results/toy/metrics/non_robust_x0_ema99.csv").unlink()
    (finished / "results/toy/metrics.csv").unlink()
    run = start(finished)
    wait_for_job(finished, run, " sample ")
    configure(finished, EDITED)
    assert run.wait() == 0
    assert results(finished) == results(undisturbed)
    before = whole(finished)
    rerun(finished)
    configure(edited, EDITED)
    rerun(edited)
    assert results(finished) == results(edited) != results(undisturbed)
    after = whole(finished)
    kept = [name for name in before if name.startswith(("data/", "models/")) or "/unconditional" in name]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
