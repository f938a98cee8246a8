"""The workflow as its users run it: dry runs of what ships, and one toy experiment from data to report."""

import collections
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from forks import forked_verbs
from workflow_runs import CONFIG, ROOT, command, copy_tree, planned, processes_in, rows_of, run_snakemake, snakemake

from nrcg import config
from nrcg.cli import main
from nrcg.cli.steps import VERBS
from nrcg.layout import EXPLANATIONS_FILES, LIKELIHOOD_FILES, OBJECTIVES_FILES
from nrcg.pipeline.plan import make_plan
from nrcg.report.columns import FORWARD_COLUMNS, METRICS_COLUMNS
from nrcg.tracking.journal import Journal

FIGURES = [
    *("forward_accuracy", "logit_sensitivity", "gradient_sensitivity", "stabilizers"),
    *("accuracy_vs_scale", "fid_vs_scale", "cfid_vs_scale", "pareto", "best_samples"),
]


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tree") / "zu Hause, 'über' uns"  # as people's folders are called
    folder.mkdir()
    return copy_tree(folder)


@pytest.fixture(scope="session")
def finished(tree) -> Path:
    """The tree after the toy experiment. Its jobs are forked; the slow tests start each as users do."""
    steps = {verb.function.partition(".")[0] for verb in VERBS.values() if verb.compute}
    with forked_verbs(sorted(steps | {"sample", "train_ddpm", "evaluate", "likelihood"})) as forking:
        words = ["toy", "--cores", "2", "--configfile", "toy.yaml"]
        code = f"{forking}; from snakemake import cli; cli.main()"
        environment = os.environ | {"NRCG_TRACKING": "off"}
        run = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=tree, env=environment, capture_output=True, text=True
        )
    assert run.returncode == 0, run.stderr[-5000:]
    return tree


# --- Before anything runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cores", "toy"), [(1, {}), (16, {"device": "cuda"})])
def test_the_threads_of_a_jobs_verb_are_those_that_snakemake_counts(tree, cores, toy):
    """Features beside a GPU are resized with as many as there are cores where no other GPU shares them, 8 at most."""
    output = snakemake(tree, "--dry-run", "toy", "--cores", str(cores), toy=toy).stdout
    job = r"^ *(?:local)?rule (\w+):\n(.+?)^Shell command: nrcg (.+?)$"
    jobs = re.findall(job, output, re.MULTILINE | re.DOTALL)
    assert {name for name, *_ in jobs} == set(config.RULES) - {"all", "density", "densities_table", "densities"}
    for name, about, shell in jobs:
        counted = int((re.search(r"^ +threads: (\d+)$", about, re.MULTILINE) or [0, 1])[1])
        assert counted <= cores
        told = re.search(r" --threads (\d+)", shell)
        if name in ("collect", "figures", "report") or name.endswith("_table"):  # write tables and pictures
            assert (told, counted) == (None, 1)
        else:
            assert told is not None, (name, shell)
            assert int(told[1]) == counted
        if name in ("evaluate", "reference") and toy:
            assert counted == 8


def some_slow(values, fast):
    """Parameters of which some alone belong to the fast tests: a dry run takes seconds."""
    return [pytest.param(value, marks=[] if value in fast else pytest.mark.slow) for value in values]


@pytest.mark.parametrize("target", some_slow((None, *CONFIG.experiments), (None, "celebahq")))
def test_every_experiment_plans_the_whole_chain(tree, tmp_path, target):
    """As many jobs of each rule as `nrcg plan` says. The default target is the quickstart."""
    name = target or "quickstart"
    experiment = CONFIG.experiments[name]
    run = run_snakemake(tree, "--dry-run", *([target] if target else []), "--quiet", "rules")
    assert run.returncode == 0, run.stdout
    found = planned(run.stdout)
    cells = len(experiment.objectives.cells) if experiment.objectives else 0
    studies = {"train_objective": cells, "objective": cells, "objectives_table": 1} if cells else {}
    if experiment.explain:
        ways = len(experiment.explain.methods)
        studies |= {"explain": ways * experiment.explain.num_shards, "evaluate_explanations": ways}
        studies |= {"explanations_table": 1}
    assert found == studies | {
        "dataset": 1,
        "train_ddpm": 1,
        "train_classifier": 3,
        "forward": 1,
        "likelihood": experiment.likelihood.num_shards,
        "likelihood_table": 1,
        "sample": experiment.num_shards * sum(map(len, experiment.sweep.values())),
        "reference": 1,
        "evaluate": len(experiment.sweep),
        "collect": 1,
        "figures": 1,
        "report": 1,
    }
    told = collections.Counter()
    for step in make_plan(CONFIG, name, tmp_path):
        told[step.rule] += step.jobs
    assert told.pop("report") == 3  # with collect and figures
    assert told == {rule: found[rule] for rule in told}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experiments: {toy: {ddpm: {epoch: 3}}}", "experiments.toy.ddpm.epoch: unknown key; allowed here: "),
        ("experiments: {toy: {target: a, target: soccer}}", "no valid YAML: the key 'target' stands twice"),
    ],
)
def test_a_mistake_is_refused_before_any_job_in_one_line(tree, text, message):
    (tree / "mistake.yaml").write_text(text)
    run = run_snakemake(tree, "toy", "--cores", "1", "--configfile", "toy.yaml", "mistake.yaml")
    assert run.returncode != 0
    (said,) = [line for line in run.stdout.splitlines() if message in line]
    assert said.startswith("nrcg: ")
    assert "Traceback" not in run.stdout and "Job stats" not in run.stdout


def test_lint_is_clean(tree):
    run = run_snakemake(tree, "--lint")
    assert run.returncode == 0
    assert "Congratulations" in run.stdout


def test_the_reserved_names_are_the_rules():
    """config.RULES is a list so that the configuration need not read the rules."""
    texts = [path.read_text() for path in [ROOT / "Snakefile", *(ROOT / "workflow/rules").glob("*.smk")]]
    rules = {
        name for text in texts for name in re.findall(r"^(?:rule|use rule \w+ as) (\w+)(?: with)?:", text, re.MULTILINE)
    }
    assert rules == set(config.RULES)


# --- The toy experiment -----------------------------------------------------------------------------------------


def test_the_results_are_where_the_docs_say(finished):
    expected = [
        "data/toyballs/dataset.json",
        *(f"data/toyballs/{split}/{name}.npy" for split in ("train", "val") for name in ("images", "labels")),
        *(f"models/toy/ddpm/{name}" for name in ("model_index.json", "training.csv", "training.json", "samples.png")),
        *(
            f"models/toy/classifiers/{role}/{name}"
            for role in config.ROLES
            for name in ("model.safetensors", "config.json", "training.csv", "accuracy_over_t.csv")
        ),
        *(
            f"results/toy/{name}"
            for name in ("forward.csv", "reference.json", "metrics.csv", "summary.json", "report.html")
        ),
        *(f"results/toy/figures/{figure}.{ending}" for figure in FIGURES for ending in ("png", "svg")),
        "results/toy/samples/unconditional/scale0/shard0001.json",
        "results/toy/samples/non_robust_x0_ema99/scale2.5/shard0000.npy",
        "logs/toy/train_ddpm.log",
        *(f"models/toy/objectives/epsilon-simple/{name}" for name in ("model_index.json", "training.json")),
        *(f"results/toy/likelihood/{name}" for name in ("shard0000.npz", *LIKELIHOOD_FILES)),
        *(f"results/toy/objectives/{name}" for name in ("v_prediction-simple.json", *OBJECTIVES_FILES)),
        *(f"results/toy/explanations/{name}" for name in ("nearest/shard0000.npz", *EXPLANATIONS_FILES)),
        *(f"benchmarks/toy/{name}.tsv" for name in ("train_ddpm", "forward", "report")),
    ]
    assert [name for name in expected if not (finished / name).stat().st_size] == []


def test_the_data_set_opens_as_memory_maps(finished):
    images = np.load(finished / "data/toyballs/train/images.npy", mmap_mode="r")
    labels = np.load(finished / "data/toyballs/train/labels.npy", mmap_mode="r")
    assert (images.shape, images.dtype) == ((96, 16, 16, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((96,), np.int64)


def test_forward_csv_has_a_row_per_curve_and_step(finished):
    rows = rows_of(finished / "results/toy/forward.csv")
    assert tuple(rows[0]) == FORWARD_COLUMNS
    curves: dict[str, list[int]] = {}
    for row in rows:
        curves.setdefault(row["method"], []).append(int(row["t"]))
    assert {"robust", "non_robust", "non_robust_x0"} < set(curves)
    assert all(sorted(steps) == list(range(1, 7)) for steps in curves.values())
    assert {int(row["num_images"]) for row in rows} == {8}


def test_the_studies_hold_what_the_report_shows(finished):
    """The objective that is the experiment's own is trained and measured as the experiment's own model is."""
    folder = finished / "results/toy"
    record = json.loads((folder / "likelihood/likelihood.json").read_text())
    assert (record["num_images"], record["num_steps"]) == (20, 3)
    assert len(rows_of(folder / "likelihood/images.csv")) == 20
    rows = {row["objective"]: row for row in rows_of(folder / "objectives/objectives.csv")}
    assert set(rows) == {"epsilon-simple", "v_prediction-simple"}
    own = rows["epsilon-simple"]
    assert float(own["bits_per_dim"]) == pytest.approx(record["bits_per_dim"][0], rel=1e-5)
    metrics = {(row["method"], row["scale"]): row for row in rows_of(folder / "metrics.csv")}
    for column, setting in (("fd_judge", ("unconditional", "0")), ("cfd_judge", ("non_robust_x0_ema99", "1"))):
        assert float(own[column]) == pytest.approx(float(metrics[setting][column]), rel=1e-4)
    forward = rows_of(folder / "forward.csv")
    smooth = [float(row["gradient_sensitivity_mean"]) for row in forward if row["method"] == "non_robust_x0"]
    assert float(own["gradient_sensitivity"]) == pytest.approx(np.mean(smooth), rel=1e-4)
    assert float(rows["v_prediction-simple"]["bits_per_dim"]) != float(own["bits_per_dim"])
    page = (folder / "report.html").read_text()
    ways = {row["method"]: row for row in rows_of(folder / "explanations/explanations.csv")}
    assert {way["num_images"] for way in ways.values()} == {"6"} and set(ways) == {"counterfactual", "nearest"}
    assert all(
        np.isfinite(float(way[name])) for way in ways.values() for name in ("l1", "validity_judge", "bits_per_dim")
    )
    assert float(ways["nearest"]["l1"]) > 0
    for words in ("Best for likelihood: ", 'id="likelihood"', 'id="objectives"', 'id="explanations"'):
        assert words in page


def test_metrics_csv_has_a_row_per_method_and_scale(finished):
    rows = rows_of(finished / "results/toy/metrics.csv")
    distances = {"fd_judge", "cfd_judge", "kd_judge", "ckd_judge"}
    assert {*METRICS_COLUMNS, *distances, "diversity", "protocols", "reference", "best_by", "mlflow_run_id"} <= set(
        rows[0]
    )
    assert {f"{name}_{end}" for name in (*distances, "precision", "judge_ece") for end in ("lo", "hi")} <= set(rows[0])
    assert [(row["method"], row["scale"], row["num_samples"]) for row in rows] == [
        ("unconditional", "0", "12"),
        ("non_robust_x0_ema99", "1", "12"),
        ("non_robust_x0_ema99", "2.5", "12"),
    ]
    for row in rows:
        assert row["experiment"] == "toy"
        assert 0 <= float(row["accuracy_judge"]) <= 1
        assert row["nonfinite"] == "0"
        assert float(row["images_per_second"]) > 0
    summary = json.loads((finished / "results/toy/summary.json").read_text())
    assert set(summary) == {"unconditional", "non_robust_x0_ema99", "record_sha256"}


def test_samples_of_all_settings_share_their_noise_and_differ_by_their_guidance(finished):
    folder = finished / "results/toy/samples"
    settings = sorted(folder.glob("*/scale*"))
    drawn = [np.concatenate([np.load(path) for path in sorted(setting.glob("*.npy"))]) for setting in settings]
    assert [images.shape for images in drawn] == [(12, 16, 16, 3)] * 3
    assert {json.loads((setting / "shard0001.json").read_text())["first_sample"] for setting in settings} == {8}


def test_the_report_is_self_contained_and_escapes_what_it_was_given(finished):
    html = (finished / "results/toy/report.html").read_text()
    assert "&lt;b&gt;not&lt;/b&gt;" in html
    assert "<b>not</b>" not in html
    assert re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(?!data:)', html) == []


def test_a_finished_experiment_leaves_nothing_to_do(finished):
    run = snakemake(finished, "--dry-run", "toy")
    assert run.returncode == 0
    assert planned(run.stdout) == {}


def test_data_and_models_are_used_by_hand_too(finished, monkeypatch):
    """Each step runs without Snakemake, from config.yaml: the same samples come out."""
    monkeypatch.chdir(finished)
    monkeypatch.setenv("NRCG_TRACKING", "off")
    raw = config.merge(config.read_yaml("config.yaml"), config.read_yaml("toy.yaml"))
    Path("whole.json").write_text(json.dumps(raw))
    flags = "--config whole.json --experiment toy --method non_robust_x0_ema99 --scale 1 --shard 1 --threads 1"
    models = "--ddpm models/toy/ddpm --classifier models/toy/classifiers/non_robust --out by_hand.npy"
    assert main(["sample", *flags.split(), *models.split()]) == 0
    by_rule = np.load("results/toy/samples/non_robust_x0_ema99/scale1/shard0001.npy")
    np.testing.assert_array_equal(np.load("by_hand.npy"), by_rule)


def test_what_a_dead_process_left_is_sent_at_the_next_start(finished, tmp_path):
    tree = Path(shutil.copytree(finished, tmp_path / "tree", symlinks=True))
    left = Journal.create(tree / ".nrcg/tracking")
    names = {"uri": "", "experiment": "left", "name": "one", "parent": "", "invocation": ""}
    left.append("start", time=1, params={}, tags={"nrcg.git_branch": "main", "nrcg.uid": left.uid}, **names)
    left.close()
    (tree / "results/toy/summary.json").unlink()
    run = snakemake(tree, "results/toy/summary.json", "--cores", "1", tracking="")
    assert run.returncode == 0 and "nrcg:" not in run.stdout, run.stdout
    assert list((tree / ".nrcg/tracking").iterdir()) == []
    with sqlite3.connect(tree / "mlflow.db") as store:
        assert store.execute("SELECT name, status FROM runs").fetchall() == [("one", "KILLED")]


# What a change reruns. `END` is cheap and follows every change of results.
END = {"collect": 1, "figures": 1, "report": 1}
EMA = {"classifier": "non_robust", "input": "pred_x0", "stabilizer": {"name": "ema", "beta": 0.95}}
OBJECTIVES = {"objective": 2, "objectives_table": 1}
MEASURED = {"evaluate_explanations": 2, "explanations_table": 1}
OF_THE_DDPM = {"likelihood": 1, "likelihood_table": 1, "explain": 2} | MEASURED
ALL = {
    "dataset": 1,
    "train_objective": 2,
    "train_ddpm": 1,
    "train_classifier": 3,
    "forward": 1,
    "sample": 6,
    "reference": 1,
    "evaluate": 2,
} | (END | OBJECTIVES | OF_THE_DDPM)
CHANGES = {
    "device": ({"device": "auto"}, {}),
    "words": ({"description": "Other words."}, {"figures": 1, "report": 1}),
    "batch size": ({"sampling": {"batch_size": 3}}, {"figures": 1, "report": 1}),
    "evaluation": (
        {"evaluation": {"num_reference": 90}},
        {"reference": 1, "evaluate": 2} | END | OBJECTIVES | MEASURED,
    ),
    "best by": ({"evaluation": {"best_by": "fid"}}, END),
    "a scale more": ({"sweep": {"non_robust_x0_ema99": [1, 2.5, 4]}}, {"sample": 2, "evaluate": 1} | END),
    "a scale less": ({"sweep": {"non_robust_x0_ema99": [1]}}, {"evaluate": 1} | END),
    "a method more": ({"sweep": {"robust": [1]}}, {"sample": 2, "evaluate": 1} | END),
    # The last shard of each of the three settings was not full.
    "more samples": ({"sampling": {"num_samples": 16}}, {"sample": 3, "evaluate": 2} | END),
    "scale and samples": (
        {"sweep": {"non_robust_x0_ema99": [1, 2.5, 4]}, "sampling": {"num_samples": 16}},
        {"sample": 5, "evaluate": 2} | END,  # two new ones, and three that were not full
    ),
    "a shard more": ({"sampling": {"num_samples": 20}}, {"sample": 6, "evaluate": 2} | END),
    "fewer samples": ({"sampling": {"num_samples": 8}}, {"evaluate": 2} | END),
    "forward": ({"forward": {"num_images": 6}}, {"forward": 1, "figures": 1, "report": 1} | OBJECTIVES),
    "judge": (
        {"classifiers": {"judge": {"epochs": 2}}},
        {"train_classifier": 1, "reference": 1, "evaluate": 2} | END | OBJECTIVES | MEASURED,
    ),
    "ddpm": (
        {"ddpm": {"epochs": 3}},
        {key: ALL[key] for key in ALL if key not in ("dataset", "train_classifier", "reference")},
    ),
    "dataset": ({"dataset": {"seed": 1}}, ALL),
}

DDPM_ANEW = {"train_ddpm": 1, "forward": 1, "sample": 6, "evaluate": 2} | END | OF_THE_DDPM
"""What is made anew where a file of the diffusion model is lost."""


@pytest.mark.parametrize("change", some_slow(CHANGES, ("scale and samples", "judge", "ddpm")))
def test_a_change_reruns_only_what_depends_on_it(finished, change):
    toy, expected = CHANGES[change]
    run = snakemake(finished, "--dry-run", "toy", "--quiet", "rules", toy=toy)
    assert run.returncode == 0, run.stdout
    assert planned(run.stdout) == expected


def test_a_methods_change_reruns_that_methods_jobs_and_what_gives_the_same_samples_none(finished):
    toy, methods = {"device": "auto", "sampling": {"batch_size": 3}}, {"non_robust_x0_ema99": EMA}
    run = snakemake(finished, "--dry-run", "toy", "--quiet", "rules", toy=toy, methods=methods)
    assert planned(run.stdout) == {"sample": 4, "evaluate": 1} | END | OBJECTIVES


JUDGE_ANEW = {"train_classifier": 1, "reference": 1, "evaluate": 2} | END | OBJECTIVES | MEASURED
LOST = {
    "figures/stabilizers.svg": {"figures": 1, "report": 1},
    "forward.csv": {"forward": 1, "figures": 1, "report": 1},
    "summary.json": END,
    "metrics/unconditional.csv": {"evaluate": 1} | END,
    "samples/unconditional/scale0/shard0001.npy": {"sample": 1, "evaluate": 1} | END,
    "reference.json": {"reference": 1, "evaluate": 2} | END | OBJECTIVES | MEASURED,
    "likelihood/shard0000.npz": {"likelihood": 1, "likelihood_table": 1, "report": 1},
    "objectives/epsilon-simple.csv": {"objective": 1, "objectives_table": 1, "report": 1},
    "explanations/pictures.png": {"explanations_table": 1, "report": 1},
    "../../models/toy/classifiers/judge/model.safetensors": JUDGE_ANEW,
    "../../models/toy/classifiers/judge/accuracy_over_t.csv": JUDGE_ANEW,
    "../../models/toy/ddpm/data_mean.npy": DDPM_ANEW,
    "../../models/toy/ddpm/model_index.json": DDPM_ANEW,
    "../../models/toy/ddpm/unet/config.json": DDPM_ANEW,
    "../../models/toy/ddpm/scheduler/scheduler_config.json": DDPM_ANEW,
}
"""What is made anew where a file of results/toy is lost."""
FAST = ("samples/unconditional/scale0/shard0001.npy", "../../models/toy/classifiers/judge/model.safetensors")


@pytest.mark.parametrize("name", some_slow(LOST, FAST))
def test_a_lost_result_is_made_anew(finished, name):
    lost, kept = finished / "results/toy" / name, finished / "kept"
    lost.rename(kept)
    try:
        assert planned(snakemake(finished, "--dry-run", "toy", "--quiet", "rules").stdout) == LOST[name]
    finally:
        kept.rename(lost)


@pytest.mark.slow
def test_the_same_weights_trained_again_leave_nothing_but_the_report_to_do(finished, tmp_path):
    """Tracked: what names the new run is no rule's input. training.csv, which the report shows, holds times."""
    tree = shutil.copytree(finished, tmp_path / "tree", symlinks=True)
    lost = [f"models/toy/{name}/training.csv" for name in ("ddpm", "classifiers/judge")]
    for name in lost:
        (tree / name).unlink()
    environment = {key: value for key, value in os.environ.items() if key != "NRCG_TRACKING"}
    environment |= {"MLFLOW_TRACKING_URI": f"sqlite:///{tree / 'mlflow.db'}", "NRCG_LOG_MODELS": "off"}
    words = command(*lost, "--cores", "2", "--configfile", "toy.yaml")
    run = subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert (tree / "mlflow.db").exists()
    assert planned(snakemake(tree, "--dry-run", "toy", "--quiet", "rules").stdout) == {"report": 1}


# --- Kills ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's parent-death signal is Linux's")
def test_a_killed_run_leaves_no_process_and_a_plain_rerun_goes_on(tmp_path):
    """kill -9 of Snakemake within the DDPM's training; the rerun takes up the checkpoint. Tracked by MLflow."""
    tree = copy_tree(tmp_path)
    ddpm = {"epochs": 60, "checkpoint_minutes": 1e-4, "sample_every": 0}
    (tree / "change.json").write_text(json.dumps({"experiments": {"toy": {"ddpm": ddpm}}}))
    words = command("models/toy/ddpm/training.json", "--cores", "1", "--configfile", "toy.yaml", "change.json")
    environment = {key: value for key, value in os.environ.items() if key != "NRCG_TRACKING"}
    environment |= {"MLFLOW_TRACKING_URI": f"sqlite:///{tree / 'mlflow.db'}", "MLFLOW_DISABLE_TELEMETRY": "true"}
    log = tree / "logs/toy/train_ddpm.log"

    def epochs() -> list[int]:
        """Logged so far."""
        return [int(found) for found in re.findall(r"^epoch (\d+),", log.read_text() if log.exists() else "", re.M)]

    run = subprocess.Popen(words, cwd=tree, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(epochs()) < 3:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    assert any("train-ddpm" in line for line in processes_in(tree))
    run.send_signal(signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 10
    while processes_in(tree) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_in(tree) == []
    assert not (tree / "models/toy/ddpm/training.json").exists()

    from mlflow.tracking import MlflowClient

    client = MlflowClient(environment["MLFLOW_TRACKING_URI"])
    toy = client.get_experiment_by_name("toy").experiment_id
    assert {run.info.status for run in client.search_runs([toy])} == {"RUNNING"}
    sync = [sys.executable, "-m", "nrcg.cli", "track", "--sync"]
    subprocess.run(sync, cwd=tree, env=environment, check=True, capture_output=True)
    statuses = {run.data.tags["nrcg.kind"]: run.info.status for run in client.search_runs([toy])}
    assert statuses == {"invocation": "KILLED", "train": "KILLED", "dataset": "FINISHED"}

    rerun = subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True)
    assert rerun.returncode == 0, rerun.stderr[-3000:]
    assert epochs()[0] > 1
    rows = rows_of(tree / "models/toy/ddpm/training.csv")
    assert [int(row["epoch"]) for row in rows] == list(range(1, ddpm["epochs"] + 1))
    assert not (tree / "models/toy/ddpm.checkpoint.pt").exists()
    assert not any(path.name.endswith(".tmp") for path in (tree / "models").rglob("*"))

    found = client.search_runs([toy], "tags.mlflow.runName = 'train_ddpm'", order_by=["attributes.start_time"])
    assert [run.info.status for run in found] == ["KILLED", "FINISHED"]
    invocations = "tags.`nrcg.kind` = 'invocation'"
    parents = client.search_runs([toy], invocations, order_by=["attributes.start_time"])
    assert [parent.info.status for parent in parents] == ["KILLED", "FINISHED"]
    assert [run.data.tags["mlflow.parentRunId"] for run in found] == [parent.info.run_id for parent in parents]
