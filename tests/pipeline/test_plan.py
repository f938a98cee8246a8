"""Estimates before the start: the counts against numbers worked out by hand, against the networks and the workflow."""

import json
from pathlib import Path

import pytest
import torch
from toys import toy_settings, write_tiny_pipeline

from nrcg.cli import main
from nrcg.config import Config, MethodConfig, load, merge, parse, read_yaml
from nrcg.layout import DatasetPaths
from nrcg.pipeline import plan, plan_table, timing
from nrcg.pipeline.plan import Costs, Counts, Step

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "config.yaml"


def method(**keys) -> MethodConfig:
    return MethodConfig(classifier="non_robust", **keys)


def toy(**changes) -> Config:
    """config.yaml with tests/data/toy.yaml and further changes of the experiment `toy` laid over it."""
    return parse(toy_settings(**changes))


def rows(config: Config, experiment: str, root: Path, counts: Counts | None = None) -> dict[str, Step]:
    return {step.name: step for step in plan.make_plan(config, experiment, root, counts)}


# --- One image ----------------------------------------------------------------------------------------------------

DDIM = {"name": "ddim", "steps": 50}


# T = 400. DDPM's last step takes no guidance: 399 gradients; every 4th of 399 steps: 100, since the first is one. A
# classifier's gradient alone is two of its passes.
@pytest.mark.parametrize(
    ("guided", "scale", "forward", "backward", "classified"),
    [
        (MethodConfig(), 0, 400, 0, 0),
        (method(input="x_t"), 10, 400, 0, 2 * 399),
        (method(), 10, 400, 399, 0),
        (method(), 0, 400, 0, 0),
        (method(grad_mode="checkpoint"), 10, 799, 399, 0),
        (method(grad_mode="no_jacobian"), 10, 400, 0, 2 * 399),
        (method(every_k=4), 10, 400, 100, 0),
        (method(sampler=DDIM), 10, 50, 50, 0),
        (method(sampler=DDIM, every_k=50), 10, 50, 1, 0),
        (MethodConfig(sampler=DDIM), 0, 50, 0, 0),
    ],
    ids=lambda value: json.dumps(value.model_dump(exclude_defaults=True)) if isinstance(value, MethodConfig) else None,
)
def test_passes_of_one_sample(guided, scale, forward, backward, classified):
    work = plan.sampling_work(guided, 400, scale, "classify net")
    step = Step("sample", 1, 1, work)
    assert (step.forward, step.backward, work["classify net"]) == (forward, backward, classified)


@pytest.mark.parametrize("keys", [{"input": "x_t"}, {}, {"every_k": 3}, {"sampler": {"name": "ddim", "steps": 4}}])
def test_the_passes_are_those_that_sampling_makes(keys, tmp_path):
    """Counted in the sampler itself: U-Net calls, and those whose gradient is taken."""
    from nrcg.classifiers.adapter import Classifier
    from nrcg.classifiers.architectures import SmallCNN
    from nrcg.guidance.guidance import ClassifierGuidance
    from nrcg.guidance.pipeline import GuidedDDPMPipeline

    pipe = GuidedDDPMPipeline.from_pretrained(write_tiny_pipeline(tmp_path))
    guided = method(**keys)
    pipe.use_sampler(guided.sampler.name)
    calls = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    guidance = ClassifierGuidance(
        Classifier(SmallCNN(2)), 0, scale=1.0, input=guided.input, every_k=guided.every_k, grad_mode=guided.grad_mode
    )
    steps = guided.sampler.steps
    pipe(num_samples=1, batch_size=1, guidance=guidance, num_inference_steps=steps, on_step=lambda done: None)
    step = Step("sample", 1, 1, plan.sampling_work(guided, len(pipe.scheduler.betas), 1.0, "classify net"))
    assert (len(calls), sum(calls)) == (step.forward, step.backward)


@pytest.mark.parametrize(
    ("num_images", "batch_size", "epochs", "expected"),
    [(8000, 64, 9, 72_000), (100, 32, 2, 192), (20, 32, 3, 60)],
    ids=["whole batches", "the rest is dropped", "one small batch"],
)
def test_images_shown_in_a_training(num_images, batch_size, epochs, expected):
    from nrcg.training.feed import epoch_batches

    assert plan.shown(num_images, batch_size, epochs) == expected
    assert epochs * sum(map(len, epoch_batches(num_images, batch_size, 0, 0))) == expected


# --- An experiment ------------------------------------------------------------------------------------------------


def test_quickstart_by_hand(tmp_path):
    """8,000 training images in batches of 64, T = 50, 64 samples at each of 12 settings."""
    config = load(CONFIG)
    parameters = timing.count_parameters(config.experiments["quickstart"], None)
    steps = {step.name: step for step in plan.make_plan(config, "quickstart", tmp_path, parameters=parameters)}
    ddpm = steps["train_ddpm"]
    assert (ddpm.images, ddpm.backward) == (4 * 8000, 4 * 8000 + 3 * 12 * 50)
    # Trained, validated each epoch, a grid at the end, and after each epoch before a smaller one and a guided one.
    assert ddpm.forward == 4 * 8000 + 4 * 256 + 36 * 50 + 3 * (16 + 4 + 12) * 50
    robust = steps["train_classifier robust"]
    assert robust.work["train mobilenet_v3_small"] == 4 * 8000
    assert robust.work["classify mobilenet_v3_small"] == 4 * 2000 + 21 * 512  # each epoch's accuracy, that over t
    assert robust.disk == 4 * 1_520_931  # MobileNetV3 of three classes: 2,542,856 less 1,025,000 and 3,075 back
    forward = steps["forward"]
    assert (forward.forward, forward.backward) == (96 * 50, 96 * 50)
    assert forward.work["classify mobilenet_v3_small"] == 2 * 2 * 96 * 50  # both classifiers' gradients on x_t
    ema = steps["sample non_robust_x0_ema99"]
    assert (ema.jobs, ema.images, ema.forward, ema.backward) == (3, 192, 192 * 50, 192 * 49)
    assert ema.disk == 192 * 20 * 20 * 3
    assert steps["dataset"].disk == 10_000 * (20 * 20 * 3 + 8)
    evaluate = steps["evaluate"]
    assert (evaluate.jobs, evaluate.images) == (8, 12 * 64)
    reference = steps["reference"]
    assert (reference.jobs, reference.images) == (1, 8000 + 3 * 2000)
    assert sum(step.done for step in steps.values()) == 0


def test_what_is_there_counts_as_done(tmp_path):
    for path in (
        "data/toyballs/dataset.json",
        "models/toy/ddpm/training.json",
        "models/toy/classifiers/judge/config.json",
        "results/toy/samples/non_robust_x0_ema99/scale2.5/shard0001.json",
        "results/toy/metrics/unconditional.csv",
        "results/toy/metrics.csv",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    done = {name: step.done for name, step in rows(toy(), "toy", tmp_path).items() if step.done}
    assert done == {
        **{"dataset": 1, "train_ddpm": 1, "train_classifier judge": 1, "sample non_robust_x0_ema99": 1},
        **{"evaluate": 1, "report": 1},
    }


@pytest.mark.parametrize(
    ("block", "manifest", "expected"),
    [
        ({"source": "celeba"}, None, (162_770, 19_867)),
        ({"source": "celeba", "num_train": 1000}, None, (1000, 19_867)),
        ({"source": "celeba"}, (900, 90), (900, 90)),
        ({"source": "folder"}, None, (None, None)),
        ({"source": "folder", "num_val": 50}, None, (None, 50)),
        ({"source": "folder"}, (70, 7), (70, 7)),
    ],
)
def test_image_counts_of_data_that_are_read(block, manifest, expected, tmp_path):
    raw = read_yaml(CONFIG)
    data = {"name": "faces", "path": "raw", "image_size": 16, "classes": ["female", "male"], **block}
    if block["source"] == "celeba":
        data["attribute"] = "Male"
    raw["experiments"] = {"own": merge(raw["experiments"]["quickstart"], {"target": "male"}) | {"dataset": data}}
    config = parse(raw)
    if manifest:
        splits = {split: {"num_images": number} for split, number in zip(("train", "val"), manifest, strict=True)}
        path = tmp_path / "data/faces/dataset.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"splits": splits}))
    found = plan.image_counts(config.experiments["own"].dataset, DatasetPaths("faces", tmp_path))
    assert (found.train, found.val) == expected
    assert bool(found.origin) == (manifest is None)  # it is said where a number does not come from the data
    steps = rows(config, "own", tmp_path, found)
    assert steps["train_ddpm"].bound == (">=" if expected[0] is None else "")
    assert steps["sample robust"].forward == 2 * 64 * 50  # known all the same


def test_pretrained_model_is_not_trained(tmp_path):
    """Its U-Net is read from the experiment's folder, or from the one that holds it."""
    write_tiny_pipeline(tmp_path / "tiny")
    config = toy(ddpm={"pretrained": str(tmp_path / "tiny")})
    settings = config.experiments["toy"]
    unet = timing.meta_unet(settings, tmp_path / "none")
    assert unet.config.block_out_channels == [8, 16] and unet.device.type == "meta"
    parameters = timing.count_parameters(settings, unet)
    steps = {step.name: step for step in plan.make_plan(config, "toy", tmp_path, parameters=parameters)}
    step = steps["train_ddpm (pretrained)"]
    assert (step.images, step.backward, step.forward) == (0, 0, 16 + 36 * 6)  # its loss once, a grid
    assert step.disk == 4 * unet.num_parameters() > 0
    (tmp_path / "tiny").rename(tmp_path / "models")
    assert timing.meta_unet(settings, tmp_path / "none") is None
    assert timing.meta_unet(settings, tmp_path / "models") is not None


# --- Time and print -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("jobs", "threads", "cores", "hours"),
    [(1, 1, 8, 2.0), (4, 1, 8, 0.5), (100, 1, 8, 0.25), (1, 16, 8, 0.25), (100, 1, None, 2.0)],
)
def test_hours(jobs, threads, cores, hours):
    """1,800 images of 2 s and 1 job's start of 3,600 s: 2 hours of one core, shared by jobs times threads."""
    step = Step("sample", jobs, 1, {"unet_forward": 1800, "start": 1}, threads=threads)
    assert step.hours(Costs({"unet_forward": 2.0, "start": 3600.0}, "it", cores)) == pytest.approx(hours)
    assert step.hours(Costs({"unet_forward": 2.0}, "it", cores)) is None


def test_sum_of_the_hours_and_what_is_left():
    steps = [
        Step("sample a", 4, 1, {"unet_forward": 3600}, done=3),
        Step("sample b", 2, 1, {"unet_forward": 7200}, done=0),
        Step("dataset", 1, 1, {"convert": 1}, done=1),
    ]
    costs = Costs({"unet_forward": 1.0}, "a device", None)
    assert plan_table.total_hours(steps, costs) == (3.0, False)
    assert plan_table.total_hours(steps, costs, left=True) == (2.25, True)  # what cannot be measured is done


@pytest.mark.parametrize(
    ("hours", "text"),
    [
        *((40 / 3600, "40 seconds"), (0.367, "22 minutes"), (3.52, "3.5 hours"), (30, "30 hours")),
        *((480, "20 days"), (43_830, "5 years")),
    ],
)
def test_duration(hours, text):
    assert plan_table.duration(hours) == text


@pytest.mark.parametrize(
    ("count", "text"), [(99_999, "99,999"), (245_000, "245.0 k"), (1_240_000, "1.2 M"), (None, "?")]
)
def test_large_counts_are_short(count, text):
    assert plan_table._count(count) == text


@pytest.mark.parametrize(
    ("hours", "cores", "warned"), [(300, 2, True), (2, 2, False), (300, None, False)], ids=["long", "short", "gpu"]
)
def test_warning_without_a_gpu(hours, cores, warned, tmp_path):
    steps = [Step("forward", 1, 1, {"unet_forward": hours * 3600})]
    costs = Costs({"unet_forward": 1.0}, "it", cores)
    notes = plan_table.plan_notes(toy().experiments["toy"], steps, costs, Counts(1, 1), {}, tmp_path)
    assert any("no GPU" in note for note in notes) == warned
    assert any(plan_table.duration(hours) in note for note in notes)


def test_warning_of_a_full_disk(tmp_path):
    steps = [Step("sample", 2, 1, disk=10**18, done=1)]
    notes = plan_table.plan_notes(toy().experiments["toy"], steps, None, Counts(1, 1), {"unet": 10**6}, tmp_path)
    assert notes[0] == "disk: while the diffusion model trains, 16.0 MB more for its checkpoint"
    assert "500.0 PB of disk are needed" in notes[1]


def test_at_most_and_at_least_are_said(tmp_path):
    config = toy()
    config.methods["non_robust_x0_ema99"] = method(skip_above=0.9)
    steps = plan.make_plan(config, "toy", tmp_path, Counts(None, None))
    table = {row[0]: row for row in plan_table.plan_rows(steps, None)}
    # 2 scales of 12 samples, T = 6: 5 gradients each.
    assert table["sample non_robust_x0_ema99"][3:6] == ("24", "<= 144", "<= 120")
    # 2 x 16 validated; grids of 16 and 36 samples; after the first epoch 4 unguided and 12 guided ones.
    assert table["train_ddpm"][3:6] == ("?", ">= 440", ">= 72")
    assert table["all"][4].startswith("about ")
    costs = {name: 1.0 for step in steps for name in step.work}
    hours = {row[0]: row[6] for row in plan_table.plan_rows(steps, Costs(costs, "it", None))}
    assert (hours["train_ddpm"], hours["all"][:3]) == ("?", ">= ")
    assert hours["report"] == "0.001"  # three jobs' start of a second each
    counts = Counts(None, None, "images: unknown")
    notes = plan_table.plan_notes(config.experiments["toy"], steps, None, counts, {}, tmp_path)
    assert notes[0] == "images: unknown" and "skip_above" in notes[1]


def test_weights_of_the_progress_bar(tmp_path):
    weights = plan.job_weights(plan.make_plan(load(CONFIG), "quickstart", tmp_path))
    # In forward passes of one image, a backward one for two.
    assert weights["train_ddpm"] == 3 * 32_000 + 4 * 256 + (36 + 3 * 20) * 50 + 3 * 3 * 12 * 50
    assert weights["forward"] == 3 * 4800
    assert weights["train_ddpm"] > weights["forward"] > weights["sample"] > weights["evaluate"] == 1


# --- The measurement ----------------------------------------------------------------------------------------------


def test_time_per_image(monkeypatch):
    """A device where a call costs 0.1 s and each image 0.01 s more: 0.11 s alone, 0.0116 s in batches of 64."""
    now, sizes = [0.0], []

    def work(size: int) -> None:
        sizes.append(size)
        now[0] += 0.1 + 0.01 * size

    monkeypatch.setattr(timing.time, "process_time", lambda: now[0])
    cpu = torch.device("cpu")
    assert timing.seconds_per_image(work, 64, device=cpu, budget=2.0) == pytest.approx(0.74 / 64)
    assert sizes[0] == 1 and max(sizes) == 64
    sizes.clear()
    # Alone and cold, then 1, 2, 4, 8, 16 and 32 images take 1.23 s: past the budget.
    assert timing.seconds_per_image(work, 10**6, device=cpu, budget=1.0) == pytest.approx(0.42 / 32)
    assert sizes == [1, 1, 2, 4, 8, 16, 32]
    sizes.clear()
    assert timing.seconds_per_image(work, 64, device=cpu, budget=0.02) == pytest.approx(0.11)
    assert sizes == [1]


def test_out_of_memory_ends_the_search(monkeypatch):
    now = [0.0]

    def work(size: int) -> None:
        if size > 4:
            raise torch.OutOfMemoryError("out of memory")
        now[0] += 0.5

    monkeypatch.setattr(timing.time, "process_time", lambda: now[0])
    assert timing.seconds_per_image(work, 64, device=torch.device("cpu"), budget=3.0) == 0.5 / 4


def test_measurement_of_the_networks(tmp_path):
    config = toy()
    settings = config.experiments["toy"]
    counted = {name for step in plan.make_plan(config, "toy", tmp_path) for name in step.work}
    arguments = {"device": torch.device("cpu"), "precision": torch.float32, "budget": 0.2}
    threads = torch.get_num_threads()
    costs, notes = timing.measure(settings, counted, unet=timing.meta_unet(settings, tmp_path), **arguments)
    assert costs.keys() == (counted | {"unet_checkpoint"}) - {"start"}
    assert notes == [] and torch.get_num_threads() == threads
    assert costs["unet_train"] > costs["unet_forward"] > 0  # several times as much work
    assert costs["unet_checkpoint"] > costs["unet_gradient"] > costs["unet_forward"]
    costs, notes = timing.measure(settings, ["unet_forward"], unet=None, **arguments)
    assert costs == {} and "not at hand" in notes[0]


# --- The verb -----------------------------------------------------------------------------------------------------


def test_verb_without_measuring_only_counts(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "quickstart", "--no-measure", "--config", str(CONFIG)]) == 0
    table = capsys.readouterr().out
    assert "hours" not in table and "sample non_robust_x0_ema99" in table


def test_verb_with_measuring(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(json.dumps(toy_settings()))
    assert main(["plan", "toy", "--config", "toy.yaml", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[-2:] == ["hours", "disk"]
    assert "measured in" in out and "CPU cores" in out and "time: " in out
    assert " ? " not in out  # every row's hours are known


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["plan", "nothing"], "experiment 'nothing' is unknown"), (["plan", "toy", "--config", "no.yaml"], "no.yaml")],
)
def test_mistakes_in_one_line(arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG.read_text())
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1
