"""DVC as its users run it: a toy quickstart pushed to a folder, pulled into a fresh clone, changed and compared."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from workflow_runs import processes_in

from nrcg import config

ROOT = Path(__file__).parents[2]
GIT = {f"GIT_{who}_{what}": "test@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
ENVIRONMENT = os.environ | GIT | {"NRCG_TRACKING": "off", "PYTHONPATH": str(ROOT)}
ENVIRONMENT["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the list of tracked files"),
]


def run(folder: Path, command: str, code: int = 0) -> str:
    """Run a command line in a folder; returns what it printed."""
    done = subprocess.run(
        command, shell=True, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == code, done.stdout[-3000:]
    return done.stdout


def shrink(folder: Path) -> None:
    """Make config.yaml's quickstart the toy experiment, with two methods at one scale; its sections stay."""
    path = folder / "config.yaml"
    raw = config.read_yaml(path)
    toy = config.read_yaml(folder / "tests/data/toy.yaml")["experiments"]["toy"]
    sections = raw["experiments"]["quickstart"]
    small = {key: toy[key] for key in sections} | {"sampling": toy["sampling"] | {"num_samples": 8}}
    small["dataset"]["name"] = sections["dataset"]["name"]
    small["sweep"] = {method: [] for method in toy["sweep"]} | {"unconditional": [0], "non_robust_x0": [1]}
    raw["experiments"]["quickstart"] = small
    path.write_text(yaml.safe_dump(json.loads(json.dumps(raw)), sort_keys=False))


def copy_repository(folder: Path) -> None:
    """The tracked files, with the toy quickstart."""
    for name in run(ROOT, "git ls-files").splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    shrink(folder)


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A fresh clone with a folder remote, after the commands of docs/tracking.md."""
    base = tmp_path_factory.mktemp("versions")
    origin = base / "origin"
    copy_repository(origin)
    run(origin, "git init -q -b main && git add -A && git commit -qm one")
    run(origin, "snakemake --cores 2")
    run(origin, "dvc commit -f && git add -A && git commit -qm results")
    run(origin, f"dvc remote add -d store {base / 'store'} && dvc push && git commit -qam remote")
    clone = base / "clone"
    run(base, f"git clone -q {origin} {clone}")
    # A newcomer's remote is in the user's own settings, not in the repository.
    run(clone, f"dvc remote add --local -f -d store {base / 'store'} && dvc pull")
    return clone


@pytest.fixture
def adopted(clone):
    """The clone after the one command; a test may change its config.yaml."""
    run(clone, "nrcg adopt")
    original = (clone / "config.yaml").read_text()
    yield clone
    (clone / "config.yaml").write_text(original)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's parent-death signal is Linux's")
@pytest.mark.parametrize("shell", ["/bin/bash", "/bin/sh"])
def test_a_kill_of_dvc_leaves_no_process_and_the_same_command_goes_on(tmp_path, shell):
    """DVC runs its commands in the user's shell."""
    tree = tmp_path / "tree"
    copy_repository(tree)
    run(tree, "git init -q -b main && git add -A && git commit -qm one")
    environment = ENVIRONMENT | {"SHELL": shell}
    repro = ["dvc", "repro", "ddpm@quickstart"]
    with open(tmp_path / "said.txt", "w") as said:
        dvc = subprocess.Popen(repro, cwd=tree, env=environment, stdout=said, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300
    while not any(" train-ddpm " in line for line in processes_in(tree)):
        assert dvc.poll() is None and time.monotonic() < deadline, (tmp_path / "said.txt").read_text()[-3000:]
        time.sleep(0.05)
    dvc.kill()
    dvc.wait()
    deadline = time.monotonic() + 10
    while processes_in(tree) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_in(tree) == []
    again = subprocess.run(repro, cwd=tree, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, (again.stdout + again.stderr)[-3000:]
    assert (tree / "models/quickstart/ddpm/training.json").exists()


def planned(output: str) -> dict[str, int]:
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", output, re.MULTILINE)}


def change(folder: Path, dotted: str, value: object) -> None:
    raw = config.read_yaml(folder / "config.yaml")
    place = raw
    *path, key = dotted.split(".")
    for part in path:
        place = place[part]
    assert place[key] != value
    place[key] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(raw)), sort_keys=False))


def test_after_pull_and_adopt_nothing_is_to_be_done(adopted):
    assert "Nothing to be done" in run(adopted, "snakemake -n")
    assert "up to date" in run(adopted, "dvc status")
    assert run(adopted, "git status --porcelain") == ""


def test_files_that_are_not_those_of_the_lock_are_not_adopted(clone):
    path = clone / "models/quickstart/classifiers/judge/config.json"
    text = path.read_text()
    path.write_text(text + " ")
    try:
        said = run(clone, "nrcg adopt", code=1)
    finally:
        path.write_text(text)
    assert said.startswith("nrcg: files or settings are not those of dvc.lock, in the stages ")
    assert "judge@quickstart" in said
    assert said.count("\n") == 1


def test_damaged_weights_are_not_committed_and_dvc_restores_them(adopted):
    name = "models/quickstart/ddpm/unet/diffusion_pytorch_model.safetensors"
    path, lock = adopted / name, (adopted / "dvc.lock").read_text()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()  # the cache may be linked to
    path.write_bytes(content)
    assert f"nrcg: {name}: damaged (" in run(adopted, "dvc repro", code=255)
    assert (adopted / "dvc.lock").read_text() == lock
    (line,) = run(adopted, "nrcg adopt", code=1).splitlines()
    restore = re.search(r"under DVC: ([^)]+)\)", line)[1]
    run(adopted, restore)
    assert "up to date" in run(adopted, "dvc status")
    assert "Nothing to be done" in run(adopted, "snakemake -n")


END = {"collect": 1, "figures": 1, "report": 1}
EXPLAINED = {"evaluate_explanations": 2, "explanations_table": 1}
CHANGES = {
    "scale": (
        *("experiments.quickstart.sweep.non_robust_x0", [2]),
        {"sample": 1, "evaluate": 1} | END,
        ["samples", "metrics", "report"],
    ),
    # Whether the metrics change is known only when the judge is trained.
    "judge": (
        *("experiments.quickstart.classifiers.judge.epochs", 2),
        {"train_classifier": 1, "reference": 1, "evaluate": 2} | EXPLAINED | END,
        ["judge", "report"],
    ),
    "forward": (
        *("experiments.quickstart.forward.num_images", 6),
        {"forward": 1, "figures": 1, "report": 1},
        ["forward", "report"],
    ),
    "reference": (
        *("defaults.evaluation.num_reference", 90),
        {"reference": 1, "evaluate": 2} | EXPLAINED | END,
        ["metrics", "explanations", "report"],
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_nested_parameter_reruns_what_depends_on_it_under_both(adopted, name):
    dotted, value, jobs, stages = CHANGES[name]
    change(adopted, dotted, value)
    found = planned(run(adopted, "snakemake -n --quiet rules"))
    assert {key: found[key] for key in found if key not in ("all", "total")} == jobs
    dry = run(adopted, "dvc repro --dry")
    assert re.findall(r"^Running stage '(\w+)@quickstart'", dry, re.MULTILINE) == stages


def test_an_experiment_and_a_branch_are_compared(adopted):
    """`dvc exp run -S` samples one scale; its parameters, metrics and plots differ from main's, as does the table."""
    out = run(adopted, "dvc exp run -n finer -S 'config.yaml:experiments.quickstart.sweep.non_robust_x0=[2]'")
    ran = re.findall(r"^ *rule (\w+):|^(?:local)?rule (\w+):", out, re.MULTILINE)
    assert not {"train_ddpm", "train_classifier", "dataset", "forward"} & {first or second for first, second in ran}
    (row,) = json.loads(run(adopted, "dvc params diff --json"))["config.yaml"].items()
    assert row == ("experiments.quickstart.sweep.non_robust_x0", {"old": "[1]", "new": "[2]"})

    run(adopted, "git checkout -q -b finer && git add -A && git commit -qm finer")
    try:
        metrics = json.loads(run(adopted, "dvc metrics diff main finer --json"))["results/quickstart/summary.json"]
        assert metrics["non_robust_x0.scale"] == {"old": 1.0, "new": 2.0, "diff": 1.0}
        assert not any(key.startswith("unconditional.") for key in metrics)
        run(adopted, "dvc plots diff main finer --out plots")
        page = (adopted / "plots/index.html").read_text()
        assert '"rev": "main"' in page and '"rev": "finer"' in page
        assert "quickstart: share of samples that the judge takes for the target" in page
        table = run(adopted, "nrcg compare main:quickstart finer:quickstart")
        rows = [line.split()[:3] for line in table.splitlines() if line.startswith("non_robust_x0 ")]
        assert rows == [["non_robust_x0", "main:quickstart", "1"], ["non_robust_x0", "finer:quickstart", "2"]]
        assert "Nothing to be done" in run(adopted, "snakemake -n")
    finally:
        shutil.rmtree(adopted / "plots", ignore_errors=True)
        run(adopted, "git checkout -qf main && dvc checkout")
