"""Tracking against a real sqlite store, and what happens where there is none."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from nrcg import tracking

NAMES = ["job 0", "job 1", "job 2", "job 3", "job 4", "killed"]
# What a job does, as a process of its own.
JOB = """
import os, sys
from nrcg import tracking
name = sys.argv[1]
with tracking.run("crowd", name, kind="test", params={"seed": 7}) as run:
    run.log_metrics({"loss": 0.5})
    if name == "killed":
        run._flush()
        os.kill(os.getpid(), 9)
print(run.id)
"""


def start_job(name: str, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", JOB, name], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A folder whose fresh mlflow.db several processes opened at once, one of which was killed."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("NRCG_TRACKING", raising=False)
        jobs = [start_job(name, folder) for name in NAMES]
        for job in jobs:
            job.out, job.err = job.communicate(timeout=120)
    assert [job.err for job in jobs] == [""] * len(jobs)
    assert [job.returncode for job in jobs] == [0, 0, 0, 0, 0, -9]
    return folder


@pytest.fixture
def client(store, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(store)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("NRCG_TRACKING", raising=False)
    monkeypatch.setattr(tracking, "_warned", False)
    return MlflowClient(f"sqlite:///{store / 'mlflow.db'}")


def runs(client, experiment: str, query: str = "") -> list:
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id], filter_string=query))


def test_processes_that_start_at_once_share_a_fresh_database(client):
    found = [run for run in runs(client, "crowd") if run.info.run_name in NAMES]
    assert sorted(run.info.run_name for run in found) == NAMES
    assert all(run.info.status == "FINISHED" or run.info.run_name == "killed" for run in found)
    assert all(run.data.metrics == {"loss": 0.5} for run in found)
    assert all(run.data.params == {"seed": "7"} and run.data.tags["nrcg.seed"] == "7" for run in found)
    assert [found.name for found in client.search_experiments() if runs(client, found.name)] == ["crowd"]


def test_runs_of_dead_processes_are_ended_at_the_next_start(client):
    with tracking.run("crowd", "sweeper", kind="test", params={}):
        (killed,) = runs(client, "crowd", "attributes.run_name = 'killed'")
        assert killed.info.status == "KILLED"
        (alive,) = runs(client, "crowd", "attributes.status = 'RUNNING'")
        assert alive.info.run_name == "sweeper"
        with tracking.run("crowd", "neighbour", kind="test", params={}):
            assert len(runs(client, "crowd", "attributes.status = 'RUNNING'")) == 2, "runs of the living stay"


def test_what_a_run_holds(client, store):
    (store / "figure.txt").write_text("x")
    with tracking.run(
        "content", "it's one", kind="train", params={"ddpm": {"seed": 3}}, tags={"role": "robust"}
    ) as run:
        run.log_metrics({"loss": 2.0}, step=1)
        run.log_metrics({"loss": 1.0, "nan": float("nan"), "inf": float("inf")}, step=2)
        run.log_artifact(store / "figure.txt", "figures")
    stored = client.get_run(run.id)
    assert (stored.info.status, stored.info.run_name) == ("FINISHED", "it's one")
    assert [(entry.step, entry.value) for entry in client.get_metric_history(run.id, "loss")] == [(1, 2.0), (2, 1.0)]
    assert str(stored.data.metrics["nan"]) == str(stored.data.metrics["inf"]) == "nan"
    tags = stored.data.tags
    assert tags["nrcg.infinite_metrics"] == "inf"
    assert (tags["nrcg.kind"], tags["role"], tags["nrcg.seed"]) == ("train", "robust", "3")
    assert {"nrcg.git_commit", "nrcg.config_hash", "nrcg.version", "nrcg.host", "nrcg.pid"} <= set(tags)
    assert (store / "mlruns" / "content" / run.id / "artifacts" / "figures" / "figure.txt").read_text() == "x"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("broken"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
        (SystemExit(1), "FAILED"),
        (SystemExit(0), "FINISHED"),
    ],
)
def test_how_the_body_ends_is_the_runs_status(client, error, status):
    with (
        pytest.raises(type(error)),
        tracking.run("ends", f"{error!r}", kind="test", params={}) as run,
    ):
        run.log_metrics({"before": 1.0})
        raise error
    stored = client.get_run(run.id)
    assert stored.info.status == status
    assert stored.data.metrics == {"before": 1.0}
    assert stored.data.tags["nrcg.error"] == f"{type(error).__name__}: {error}"


def test_older_runs_of_the_same_name_are_superseded(client):
    ids = []
    for name in ("again", "other", "again", "again"):
        with tracking.run("repeat", name, kind="test", params={}) as run:
            ids.append(run.id)
    by = [client.get_run(run_id).data.tags.get("nrcg.superseded_by") for run_id in ids]
    assert by == [ids[2], None, ids[3], None]
    current = runs(client, "repeat", "tags.`nrcg.superseded_by` IS NULL")
    assert {run.info.run_id for run in current} == {ids[1], ids[3]}


def test_a_deleted_experiment_is_restored(client):
    with tracking.run("deleted", "one", kind="test", params={}) as run:
        pass
    client.delete_experiment(client.get_experiment_by_name("deleted").experiment_id)
    with tracking.run("deleted", "one", kind="test", params={}) as again:
        pass
    assert client.get_run(run.id).data.tags["nrcg.superseded_by"] == again.id


def test_many_params_and_metrics_go_in_pieces(client):
    params = {f"key{i}": "x" * 7000 for i in range(230)}
    with tracking.run("pieces", "one", kind="test", params=params) as run:
        for step in range(1500):
            run.log_metrics({"loss": float(step)}, step)
    stored = client.get_run(run.id)
    assert len(stored.data.params) == 230
    assert len(stored.data.params["key0"]) == tracking.MAX_PARAM
    assert len(client.get_metric_history(run.id, "loss")) == 1500


def test_a_store_that_fails_under_way_is_tried_again(client, monkeypatch, capsys):
    with tracking.run("flaky", "one", kind="test", params={}) as run:
        log_batch = run._client.log_batch
        monkeypatch.setattr(run._client, "log_batch", lambda *_, **__: 1 / 0)
        monkeypatch.setattr(run, "_next_flush", 0.0)
        run.log_metrics({"loss": 1.0}, 1)
        run.log_artifact("no such file")
        monkeypatch.setattr(run._client, "log_batch", log_batch)
    assert client.get_run(run.id).data.metrics == {"loss": 1.0}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nrcg: warning: tracking by MLflow at mlflow.db fails")


def test_switched_off_nothing_is_imported_or_written(tmp_path):
    code = (
        "import sys\n"
        "from nrcg import tracking\n"
        "with tracking.run('off', 'one', kind='test', params={}) as run:\n"
        "    run.log_metrics({'loss': 1.0}, 1)\n"
        "    run.log_artifact('missing')\n"
        "assert run.id == '' and 'mlflow' not in sys.modules\n"
    )
    environment = {"NRCG_TRACKING": "off", "PATH": ""}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_down_costs_one_line_and_little_time(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NRCG_TRACKING", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:1")
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tracking, "_warned", False)
    started = time.monotonic()
    for name in ("one", "two"):
        with tracking.run("down", name, kind="test", params={}) as run:
            run.log_metrics({"loss": 1.0})
        assert run.id == ""
    # MLflow's own settings would take minutes; the import of mlflow on a busy machine takes several seconds.
    assert time.monotonic() - started < 30
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nrcg: warning: tracking by MLflow at http://127.0.0.1:1 fails, the job goes on without")
    assert "secret" not in line


def test_params_are_flattened():
    params = {"ddpm": {"seed": 0, "unet": {"attention": [True, False]}}, "name": "x", "none": None, "empty": {}}
    assert tracking.flatten(params) == {
        "ddpm.seed": "0",
        "ddpm.unet.attention": "[true, false]",
        "name": "x",
        "none": "null",
        "empty": "{}",
    }


@pytest.mark.parametrize(
    ("key", "clean"), [("a(b)", "a_b_"), ("../a", "_/a"), ("x" * 300, "x" * 247 + "..."), ("é=1", "é_1"), ("", "_")]
)
def test_keys_that_mlflow_refuses_are_changed(key, clean):
    assert list(tracking.flatten({key: 1})) == [clean]


def test_the_hash_depends_on_settings_and_not_on_their_order():
    def config_hash(params: dict) -> str:
        return tracking._standard_tags("test", params, {})["nrcg.config_hash"]

    assert config_hash({"a": 1, "b": (1, 2)}) == config_hash({"b": [1, 2], "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})
    assert config_hash({"a": Path("x"), "b": float("inf")}) == config_hash({"a": "x", "b": "inf"})


def test_the_git_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert tracking.git_commit() == "unknown"
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "test@example.org")
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], check=True)
    commit = tracking.git_commit()
    assert len(commit) == 40
    (tmp_path / "file").write_text("2")
    assert tracking.git_commit() == f"{commit}-dirty"
