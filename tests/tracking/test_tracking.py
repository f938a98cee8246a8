"""Tracking against a real sqlite store and a real server, and what happens where there is none."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from forks import Forks
from synthetic import metric_rows
from toys import track_without_a_store

from nrcg import tracking
from nrcg.cli import main
from nrcg.csv_files import write_csv
from nrcg.errors import NrcgError
from nrcg.provenance import git_commit
from nrcg.tracking import store as stores
from nrcg.tracking.journal import Journal
from nrcg.tracking.models import load_module
from nrcg.tracking.sending import JOURNALS

VARIABLES = ("MLFLOW_TRACKING_URI", "NRCG_TRACKING", "NRCG_INVOCATION", "NRCG_LOG_MODELS", "DVC_EXP_NAME")
NAMES = ["job 0", "job 1", "job 2", "killed"]
# What a job does, as a process of its own.
JOB = """
import os, sys
from nrcg import tracking
name = sys.argv[1]
with tracking.run("crowd", name, kind="test", params={"seed": 7}) as run:
    run.log_metrics({"loss": 0.5})
    if name == "killed":
        run._send()
        os.kill(os.getpid(), 9)
print(run.id)
"""


MLFLOW = Forks(
    "import mlflow.tracking, mlflow.store.db.utils, mlflow.store.tracking.sqlalchemy_store, alembic.command\n"
    "from nrcg import cli, tracking",
    MLFLOW_DISABLE_TELEMETRY="true",
    **dict.fromkeys(VARIABLES, ""),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A folder whose fresh mlflow.db several processes opened at once, one of which was killed."""
    folder = tmp_path_factory.mktemp("store")
    jobs = MLFLOW.run(folder, JOB, *([name] for name in NAMES))
    assert [job.returncode for job in jobs] == [0, 0, 0, -9]
    assert [len(job.stdout.split()) for job in jobs] == [1, 1, 1, 0], jobs  # the run's id, and nothing on stderr
    return folder


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """A process that has tracked nothing yet."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(stores, "_warned", False)
    stores.connect.cache_clear()


@pytest.fixture
def client(store, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(store)
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
    tags = [client.get_run(run_id).data.tags for run_id in ids]
    assert [one.get("nrcg.superseded_by") for one in tags] == [ids[2], None, ids[3], None]
    assert [one.get("nrcg.supersedes") for one in tags] == [None, None, ids[0], ids[2]]


def test_a_run_that_is_sent_late_is_superseded_by_a_newer_one(client, monkeypatch):
    with tracking.run("late", "one", kind="test", params={}) as first:
        pass
    write_left("late", monkeypatch)
    with tracking.run("late", "one", kind="test", params={}) as newest:
        pass
    tracking.sync()
    tags = {run.info.run_id: run.data.tags for run in runs(client, "late")}
    (late,) = tags.keys() - {first.id, newest.id}
    assert tags[late]["nrcg.superseded_by"] == tags[first.id]["nrcg.superseded_by"] == newest.id
    assert tags[newest.id]["nrcg.supersedes"] == f"{first.id},{late}"
    assert "nrcg.superseded_by" not in tags[newest.id]


def test_a_failed_rerun_supersedes_nothing_and_other_branches_stay(client, monkeypatch):
    with tracking.run("branches", "one", kind="test", params={}) as first:
        pass
    with pytest.raises(ValueError), tracking.run("branches", "one", kind="test", params={}):
        raise ValueError
    monkeypatch.setenv("DVC_EXP_NAME", "other")
    with tracking.run("branches", "one", kind="test", params={}) as elsewhere:
        pass
    tags = client.get_run(elsewhere.id).data.tags
    assert tags["nrcg.git_branch"] == "other" and "nrcg.supersedes" not in tags
    assert "nrcg.superseded_by" not in client.get_run(first.id).data.tags


def test_a_deleted_experiment_is_restored(client, monkeypatch):
    with tracking.run("deleted", "one", kind="test", params={}) as run:
        pass
    client.delete_experiment(client.get_experiment_by_name("deleted").experiment_id)
    stores.connect.cache_clear()  # another process
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
    assert len(stored.data.params["key0"]) == 6000
    assert len(client.get_metric_history(run.id, "loss")) == 1500


def test_a_store_that_fails_under_way_is_tried_again(client, store, monkeypatch, capsys):
    left = set((store / ".nrcg/tracking").iterdir())
    with tracking.run("flaky", "one", kind="test", params={}) as run:
        api = stores.connect(stores.tracking_uri()).client
        log_batch = api.log_batch
        monkeypatch.setattr(api, "log_batch", lambda *_, **__: 1 / 0)
        monkeypatch.setattr(run, "_next_send", 0.0)
        run.log_metrics({"loss": 1.0}, 1)
        run.log_artifact("no such file")
        monkeypatch.setattr(api, "log_batch", log_batch)
    assert client.get_run(run.id).data.metrics == {"loss": 1.0}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nrcg: warning: tracking by MLflow at mlflow.db fails, the job goes on")
    assert set((store / ".nrcg/tracking").iterdir()) <= left


# --- Parents, children, data sets, models ------------------------------------------------------------------------


def children(client, experiment: str, parent: str) -> list[str]:
    found = runs(client, experiment, f"tags.mlflow.parentRunId = '{parent}'")
    return sorted(run.info.run_name for run in found)


@pytest.mark.parametrize("status", ["FINISHED", "FAILED"])
def test_jobs_are_children_of_their_invocation(client, store, monkeypatch, status):
    experiment = f"invocation {status}"
    invocation = tracking.new_invocation()
    monkeypatch.setenv("NRCG_INVOCATION", invocation)
    for name in ("train", "evaluate"):
        with tracking.run(experiment, name, kind="test", params={}) as job:
            if name == "evaluate":
                with tracking.run(experiment, "scale 1", kind="test", params={}):
                    pass
    with tracking.run(experiment, "shard", kind="test", params={}, deferred=True) as shard:
        shard.log_metrics({"seconds": 2.0})
    assert shard.id.startswith("pending-")
    (parent,) = runs(client, experiment, "tags.`nrcg.kind` = 'invocation'")
    assert parent.info.status == "RUNNING"
    assert children(client, experiment, parent.info.run_id) == ["evaluate", "train"]
    assert children(client, experiment, job.id) == ["scale 1"]

    assert main(["track", "--finish", invocation, "--status", status]) == 0
    assert client.get_run(parent.info.run_id).info.status == status
    assert children(client, experiment, parent.info.run_id) == ["evaluate", "shard", "train"]
    assert runs(client, experiment, "attributes.run_name = 'shard'")[0].data.metrics == {"seconds": 2.0}
    assert list((store / ".nrcg/tracking").glob("*")) == []


def test_the_parent_of_a_killed_invocation_is_closed_at_the_next_start(client, store, monkeypatch):
    dead = subprocess.Popen(
        [sys.executable, "-c", "from nrcg import tracking; print(tracking.new_invocation())"],
        stdout=subprocess.PIPE,
        text=True,
    )
    invocation = dead.communicate()[0].strip()
    monkeypatch.setenv("NRCG_INVOCATION", invocation)
    with tracking.run("killed parent", "one", kind="test", params={}):
        pass
    monkeypatch.delenv("NRCG_INVOCATION")
    stores.connect.cache_clear()
    with tracking.run("killed parent", "two", kind="test", params={}):
        (parent,) = runs(client, "killed parent", "tags.`nrcg.kind` = 'invocation'")
        assert parent.info.status == "KILLED"
    tracking.sync()
    assert list((store / ".nrcg/tracking").glob("*")) == []


def test_a_data_set_is_logged_as_an_input(client, tmp_path):
    import mlflow.data

    sha256 = "0123456789abcdef" * 4
    with tracking.run("data", "one", kind="test", params={}) as run:
        run.log_dataset(
            name="balls/train", path=tmp_path, sha256=sha256, shape=(5, 8, 8, 3), classes=["a", "b"], context="training"
        )
    (entry,) = client.get_run(run.id).inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("balls/train", sha256[:36])
    assert [(tag.key, tag.value) for tag in entry.tags] == [("mlflow.data.context", "training")]
    assert json.loads(entry.dataset.profile) == {"num_images": 5, "classes": ["a", "b"], "images_sha256": sha256}
    assert mlflow.data.get_source(entry.dataset).load() == str(tmp_path)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """An untrained classifier and U-Net in the pipeline's folders."""
    import torch
    from toys import write_tiny_pipeline

    from nrcg.classifiers.architectures import SmallCNN
    from nrcg.classifiers.storage import save_classifier
    from nrcg.files import sha256_file

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = {"architecture": "small_cnn", "classes": ["a", "b", "c"], "image_size": 8, "channels": 3}
    save_classifier(folder / "judge", SmallCNN(3), config)
    write_tiny_pipeline(folder / "ddpm")
    sha256 = sha256_file(folder / "ddpm/unet/diffusion_pytorch_model.safetensors")
    (folder / "ddpm/training.json").write_text(json.dumps({"sha256": sha256}))
    return {"judge": folder / "judge", "ddpm": folder / "ddpm"}


@pytest.mark.parametrize("name", ["judge", pytest.param("ddpm", marks=pytest.mark.slow)])
def test_mlflow_opens_a_logged_model(client, store, models, name):
    """At another batch size than it was exported with; no file of it is a pickle."""
    import mlflow
    import torch

    with tracking.run("models", name, kind="train", params={}) as run:
        run.log_model(models[name], name)
    stored = client.get_run(run.id)
    assert "nrcg.model_error" not in stored.data.tags
    (output,) = stored.outputs.model_outputs
    logged = client.get_logged_model(output.model_id)
    assert (logged.name, str(logged.status), logged.source_run_id) == (name, "READY", run.id)
    mlflow.set_tracking_uri(f"sqlite:///{store / 'mlflow.db'}")
    opened = mlflow.pytorch.load_model(f"models:/{output.model_id}")
    module, _ = load_module(models[name])
    x, t = torch.randn(5, 3, 8, 8), torch.arange(5)
    inputs = (x,) if name == "judge" else (x, t)
    with torch.no_grad():
        torch.testing.assert_close(opened(*inputs), module(*inputs), rtol=1e-5, atol=1e-6)
    assert [path.name for path in (store / "mlruns").rglob("*.p*") if path.suffix in (".pth", ".pkl", ".pt")] == []


def test_models_are_left_out_on_request_and_one_that_cannot_be_exported_is_named(client, models, monkeypatch):
    monkeypatch.setattr("nrcg.tracking.models.export_model", lambda *_: 1 / 0)
    with tracking.run("no models", "fails", kind="train", params={}) as run:
        run.log_model(models["judge"], "judge")
    assert client.get_run(run.id).data.tags["nrcg.model_error"].startswith("ZeroDivisionError")
    monkeypatch.setenv("NRCG_LOG_MODELS", "off")
    with tracking.run("no models", "off", kind="train", params={}) as run:
        run.log_model(models["judge"], "judge")
    assert "nrcg.model_error" not in client.get_run(run.id).data.tags


def log_sweep(rows: list[dict]) -> list[dict]:
    """Log rows of metrics.csv as `nrcg evaluate` does; returns them with their runs' ids."""
    logged, experiment = [], rows[0]["experiment"]
    for method in dict.fromkeys(row["method"] for row in rows):
        tags, made = {"method": method}, []
        with tracking.run(experiment, method, kind=tracking.KIND_METHOD, params={}, tags=tags) as method_run:
            for row in (row for row in rows if row["method"] == method):
                params, name = {"scale": row["scale"]}, f"{method} scale {row['scale']}"
                with tracking.run(experiment, name, kind="sample", params=params, tags=tags) as run:
                    run.log_metrics({key: number for key, number in row.items() if isinstance(number, float)})
                made.append(row | {"mlflow_run_id": run.id})
            best = max(made, key=lambda row: row["accuracy_judge"])
            tracking.log_method_over_scales(method_run, made, {key: best[key] for key in ("scale", "accuracy_judge")})
        logged += made
    return logged


def log_method(experiment: str, method: str, accuracies: dict[float, float]) -> None:
    """One method whose accuracy is all that is known."""
    rows = [{"scale": scale, "accuracy_judge": accuracy} for scale, accuracy in accuracies.items()]
    log_sweep([{"experiment": experiment, "method": method, **row} for row in rows])


def test_a_methods_curve_and_the_rows_of_its_newest_run(client):
    log_method("curve", "robust", {1.0: 0.1, 5.0: 0.2})
    log_method("curve", "adam", {0.05: 0.3})
    log_method("curve", "robust", {1.0: 0.4, 2.5: 0.5, 4.0: 0.2})
    newest = runs(client, "curve", "tags.`nrcg.kind` = 'evaluate' and tags.`nrcg.superseded_by` IS NULL")
    history = {
        run.info.run_name: [
            (entry.step, entry.value) for entry in client.get_metric_history(run.info.run_id, "accuracy_judge")
        ]
        for run in newest
    }
    assert history == {"robust": [(1000, 0.4), (2500, 0.5), (4000, 0.2)], "adam": [(50, 0.3)]}
    (numbers,) = (run.data.metrics for run in newest if run.info.run_name == "robust")
    assert (numbers["best/scale"], numbers["best/accuracy_judge"], numbers["accuracy_judge"]) == (2.5, 0.5, 0.2)
    rows = tracking.read_rows("curve")
    found = {(row["method"], row["scale"]): row["accuracy_judge"] for row in rows}
    robust = {("robust", 1.0): 0.4, ("robust", 2.5): 0.5, ("robust", 4.0): 0.2}
    assert found == robust | {("adam", 0.05): 0.3}, "scale 5 is no longer swept"
    assert client.get_run(rows[0]["mlflow_run_id"]).info.run_name.endswith(f"scale {rows[0]['scale']}")
    assert tracking.read_rows("curve", branch="elsewhere") == tracking.read_rows("no such experiment") == []


GIT = {f"GIT_{who}_{what}": "test@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], check=True, capture_output=True, env=os.environ | GIT)


def test_a_comparison_is_of_all_methods_and_the_newest_numbers(client, store, tmp_path, monkeypatch, capsys):
    """MLflow's rows stand for an experiment only where they are of the runs that metrics.csv names."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".gitignore").write_text(".nrcg\n")
    git("init", "-q", "-b", "whole")
    git("commit", "-q", "--allow-empty", "-m", "empty")  # without one there is no branch
    rows = [row for row in metric_rows("whole") if row["method"] in ("robust", "non_robust")]
    made = log_sweep(rows)

    def compared(filed: list[dict], source: str = "whole") -> tuple[set[str], str]:
        """Methods at their best scales, and where the numbers are from, with this metrics.csv."""
        if filed:
            write_csv(tmp_path / "results/whole/metrics.csv", filed, list(filed[0]))
        assert main(["compare", source]) == 0
        lines = capsys.readouterr().out.splitlines()
        (note,) = [line for line in lines if line.startswith(f"{source}: ")]
        return {" ".join(line.split()[:2]) for line in lines if line.startswith(("robust ", "non_robust "))}, note

    best, file = {"robust 20", "non_robust 5"}, "whole: results/whole/metrics.csv, since MLflow"
    uid = client.get_run(made[0]["mlflow_run_id"]).data.tags["nrcg.uid"]
    for filed in ([], made, [made[0] | {"mlflow_run_id": f"pending-{uid}"}, *made[1:]]):  # none; the same; sent later
        table, note = compared(filed)
        assert table == best and note.startswith("whole: newest runs of branch whole in MLflow")
    for filed, reason in (
        ([made[0] | {"scale": 4.0}, *made[1:]], "lacks robust scale 4"),
        (made[1:], "holds beside them robust scale 5"),
        ([row | {"mlflow_run_id": ""} for row in made], "holds other runs of non_robust scale 5 and 4 more"),
    ):
        assert compared(filed) == (best, f"{file} {reason} (branch whole)")

    # A branch where one method alone ran anew.
    git("checkout", "-q", "-b", "finer")
    again = log_sweep([row for row in rows if row["method"] == "robust"])
    reason = "since MLflow lacks non_robust scale 5 and 1 more (branch finer)"
    filed = again + [row for row in made if row["method"] == "non_robust"]
    assert compared(filed) == (best, f"whole: results/whole/metrics.csv, {reason}")
    git("add", "results")
    git("commit", "-q", "-m", "finer")
    note = f"finer:whole: results/whole/metrics.csv of git revision finer, {reason}"
    assert compared([], "finer:whole") == (best, note)


def test_switched_off_nothing_is_imported_or_written(tmp_path):
    code = (
        "import sys\n"
        "from nrcg import tracking\n"
        "with tracking.run('off', 'one', kind='test', params={}) as run:\n"
        "    run.log_metrics({'loss': 1.0}, 1)\n"
        "    run.log_artifact('missing')\n"
        "assert run.id == '' and 'mlflow' not in sys.modules\n"
    )
    environment = {"NRCG_TRACKING": "off", "PATH": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert list(tmp_path.iterdir()) == []


# --- A server, up and down ---------------------------------------------------------------------------------------


class Server:
    """`mlflow server` on a port of its own that can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        words = f"server --workers 1 --host 127.0.0.1 --port {self.port} --backend-store-uri sqlite:///server.db"
        environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words.split(), "--artifacts-destination", "artifacts"],
            cwd=self.folder,
            env=environment | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 200
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).read()
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline
                time.sleep(0.3)

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.stop()


def test_a_server_that_dies_under_way_loses_nothing(server, tmp_path, monkeypatch, capsys):
    """One run begun before the server died, one while it was down, and their parent; each once."""
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    invocation = tracking.new_invocation()
    monkeypatch.setenv("NRCG_INVOCATION", invocation)
    (tmp_path / "grid.txt").write_text("before")
    with tracking.run("remote", "before", kind="test", params={"a": {"b": 1}}) as before:
        before.log_metrics({"loss": 3.0}, 1)
        before._send()
        server.stop()
        before.log_metrics({"loss": 2.0}, 2)
        before._send()
        with tracking.run("remote", "within", kind="test", params={}) as within:
            within.log_metrics({"loss": 1.0, "inf": float("inf")}, 3)
            within.log_artifact("grid.txt", "grids")
            (tmp_path / "grid.txt").write_text("after")
    assert not before.id.startswith("pending-")
    assert within.id.startswith("pending-")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nrcg: warning: tracking by MLflow at {server.uri} fails, the job goes on")
    assert main(["track", "--sync"]) == 1
    assert "cannot be reached" in capsys.readouterr().err
    assert main(["track", "--finish", invocation]) == 0, "a workflow does not fail by its tracking"
    assert capsys.readouterr().err.startswith("nrcg: warning: ")

    server.start()
    assert main(["track", "--sync"]) == 0
    assert capsys.readouterr().out == "2 runs sent\n"
    client = MlflowClient(server.uri)
    by_name = {run.info.run_name: run for run in runs(client, "remote")}
    (parent,) = by_name.keys() - {"before", "within"}
    assert len(runs(client, "remote")) == 3
    assert {run.info.status for run in by_name.values()} == {"FINISHED"}
    sent, late = by_name["before"], by_name["within"]
    assert (sent.info.run_id, sent.data.params) == (before.id, {"a.b": "1"})
    assert sent.data.tags["mlflow.parentRunId"] == by_name[parent].info.run_id
    assert late.data.tags["mlflow.parentRunId"] == before.id
    assert within.id == f"pending-{late.data.tags['nrcg.uid']}"
    assert late.data.tags["nrcg.infinite_metrics"] == "inf"
    assert [(one.step, one.value) for one in client.get_metric_history(before.id, "loss")] == [(1, 3.0), (2, 2.0)]
    (artifact,) = client.list_artifacts(late.info.run_id, "grids")
    assert (artifact.path, artifact.file_size) == ("grids/grid.txt", len("before"))

    assert main(["track", "--sync"]) == 0
    assert capsys.readouterr().out == "nothing is missing\n"
    again = {run.info.run_name: run for run in runs(client, "remote")}
    assert all(str(again[name].to_dictionary()) == str(by_name[name].to_dictionary()) for name in again | by_name)
    assert list((tmp_path / ".nrcg/tracking").glob("*")) == []


@pytest.mark.slow
def test_models_go_through_a_server(server, models, tmp_path, monkeypatch):
    import mlflow
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    with tracking.run("served", "train", kind="train", params={}) as run:
        run.log_model(models["judge"], "judge")
    mlflow.set_tracking_uri(server.uri)
    (output,) = mlflow.get_run(run.id).outputs.model_outputs
    assert mlflow.pytorch.load_model(f"models:/{output.model_id}")(torch.zeros(1, 3, 8, 8)).shape == (1, 3)


def test_a_server_that_is_down_costs_one_line_and_little_time(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:1")
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    started = time.monotonic()
    for name in ("one", "two"):
        with tracking.run("down", name, kind="test", params={}) as run:
            run.log_metrics({"loss": 1.0})
        assert run.id.startswith("pending-")
    # MLflow's own settings would take minutes; the import of mlflow on a busy machine takes several seconds.
    assert time.monotonic() - started < 30
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nrcg: warning: tracking by MLflow at http://127.0.0.1:1 fails, the job goes on")
    assert "secret" not in line
    kept = [path.read_text() for path in (tmp_path / ".nrcg/tracking").glob("*.jsonl")]
    assert len(kept) == 2
    assert not any("secret" in text for text in kept)
    with pytest.raises(NrcgError, match="what is not sent is kept, send it later by: nrcg track --sync") as refused:
        tracking.sync()
    assert "secret" not in str(refused.value)


@pytest.mark.slow
def test_what_was_begun_in_one_store_goes_whole_to_another(tmp_path, monkeypatch):
    """A job is killed; what it logged, sent or not, is found in the store that `sync` is pointed to."""
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    MLFLOW.run(tmp_path, JOB, ["killed"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    assert tracking.sync() == tracking.Sync(1)
    (stored,) = runs(MlflowClient(f"sqlite:///{tmp_path / 'other.db'}"), "crowd")
    assert (stored.info.status, stored.data.metrics) == ("KILLED", {"loss": 0.5})
    assert tracking.sync() == tracking.Sync(0)


def test_the_journal_of_a_living_process_is_left_alone(tmp_path):
    living = Journal.create(tmp_path)
    living.append("start", time=1)
    assert Journal.open(living.path) is None
    living.close()
    # A kill while the second line was written.
    with living.path.open("a") as file:
        file.write('{"op": "met')
    left = Journal.open(living.path)
    assert left.entries == [{"op": "start", "time": 1}]
    left.mark_sent(1, "id")
    left.close()
    again = Journal.open(living.path)
    assert (again.sent, again.run_id, again.entries) == (1, "id", [{"op": "start", "time": 1}])
    again.remove()
    assert list(tmp_path.iterdir()) == []


def write_left(experiment: str, monkeypatch) -> Path:
    """The journal of a run with three metrics whose process is gone, unsent."""
    before = set(JOURNALS.glob("*.jsonl"))
    with monkeypatch.context() as patch:
        patch.setattr("nrcg.tracking.runs.send", lambda *_: 1 / 0)
        with tracking.run(experiment, "one", kind="test", params={}) as run:
            for step in (1, 2, 3):
                run.log_metrics({"loss": float(step)}, step)
    (path,) = set(JOURNALS.glob("*.jsonl")) - before
    assert len(path.read_bytes().splitlines()) == 5
    return path


def flip(path: Path, line: int, old: bytes, new: bytes) -> bytes:
    lines = path.read_bytes().splitlines(keepends=True)
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new)
    path.write_bytes(b"".join(lines))
    return path.read_bytes()


@pytest.mark.parametrize(
    ("line", "old", "new", "said", "losses"),
    [
        (1, b'"op"', b'"oq"', "which run it is of is not known", None),
        (1, b"{", b"\xff", "which run it is of is not known", None),
        (3, b"2.0", b"7.0", "its other lines were sent", [1, 3]),
        (3, b'"values"', b'"values', "its other lines were sent", [1, 3]),
        (5, b'"status"', b'"statvs"', "its other lines were sent", [1, 2, 3]),
    ],
)
def test_a_damaged_journal_is_sent_as_far_as_it_is_whole_and_set_aside(
    client, monkeypatch, capsys, line, old, new, said, losses
):
    experiment = f"damaged {line} {old!r}"
    path = write_left(experiment, monkeypatch)
    content = flip(path, line, old, new)
    capsys.readouterr()
    assert main(["track", "--sync"]) == 1
    (told,) = capsys.readouterr().err.splitlines()
    said = f"line {line} has changed since it was written; {said}; set aside as {path.name}.damaged"
    assert told == f"nrcg: not sent: {path}: {said}"
    aside = path.with_name(f"{path.name}.damaged")
    assert aside.read_bytes() == content and not path.exists()
    aside.unlink()
    assert main(["track", "--sync"]) == 0
    assert capsys.readouterr().err == ""
    if losses is None:
        assert client.get_experiment_by_name(experiment) is None
        return
    (stored,) = runs(client, experiment)
    assert [entry.value for entry in client.get_metric_history(stored.info.run_id, "loss")] == losses
    assert stored.info.status == ("KILLED" if line == 5 else "FINISHED")


def test_damage_in_one_file_keeps_no_other_from_being_sent(client, monkeypatch, capsys):
    first, second = (write_left("beside", monkeypatch) for _ in range(2))
    flip(first, 1, b"{", b"[")
    (JOURNALS / "no name.invocation").touch()
    capsys.readouterr()
    assert main(["track", "--sync"]) == 1
    told = capsys.readouterr()
    assert told.out == "1 run sent\n"
    assert [line.split(": ")[2] for line in told.err.splitlines()] == [str(first), f"{JOURNALS}/no name.invocation"]
    assert not second.exists()
    for path in JOURNALS.glob("*"):
        path.unlink()
    (stored,) = runs(client, "beside")
    assert (stored.info.status, stored.data.metrics) == ("FINISHED", {"loss": 3.0})


def test_a_damaged_database_is_to_be_moved_away(store, tmp_path, monkeypatch, capsys):
    content = (store / "mlflow.db").read_bytes()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow.db").write_bytes(content[: len(content) // 2])
    with tracking.run("cut off", "one", kind="test", params={}):
        pass
    stores.connect.cache_clear()
    assert main(["track", "--sync"]) == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert all("move mlflow.db, which is damaged, away, then: nrcg track --sync" in line for line in told)
    (tmp_path / "mlflow.db").rename(tmp_path / "old.db")
    (sync,) = MLFLOW.run(
        tmp_path, "from nrcg.cli import main; main(['track', '--sync'])", []
    )  # MLflow keeps a file open
    assert sync.stdout == "1 run sent\n"


def test_params_are_flattened_and_keys_that_mlflow_refuses_changed():
    params = {"ddpm": {"seed": 0, "unet": {"attention": [True, False]}}, "name": "x", "none": None, "empty": {}}
    flat = {"ddpm.seed": "0", "ddpm.unet.attention": "[true, false]", "name": "x", "none": "null", "empty": "{}"}
    assert tracking.flatten(params) == flat
    assert list(tracking.flatten({"a(b)": 1, "../a": 1, "é=1": 1, "": 1})) == ["a_b_", "_/a", "é_1", "_"]


def test_the_hash_depends_on_settings_and_not_on_their_order(tmp_path, monkeypatch):
    track_without_a_store(monkeypatch, tmp_path)

    def config_hash(params: dict) -> str:
        with tracking.run("hash", "one", kind="test", params=params):
            path = max(JOURNALS.glob("*.jsonl"))
        return json.loads(path.read_text().splitlines()[0])["tags"]["nrcg.config_hash"]

    assert config_hash({"a": 1, "b": (1, 2)}) == config_hash({"b": [1, 2], "a": 1})
    assert config_hash({"a": Path("x"), "b": float("inf")}) != config_hash({"a": Path("y"), "b": float("inf")})


def test_the_git_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() == "unknown"
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        git(*command)
    commit = git_commit()
    assert len(commit) == 40
    (tmp_path / "file").write_text("2")
    assert git_commit() == f"{commit}-dirty"
