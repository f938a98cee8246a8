"""What an experiment asks for before it starts: jobs, images, passes through the U-Net, time and disk.

Counting only, and no torch: `nrcg.pipeline.timing` measures what an image costs. What is counted has a name:

    unet_train              one image of a training step
    unet_forward            one image through the U-Net
    unet_gradient           the same, with the gradient of a classifier back to x_t
    unet_checkpoint         the same with gradient checkpointing: forward twice
    train ARCHITECTURE      one image of a classifier's training step
    classify ARCHITECTURE   one image through a classifier; for a pretrained one its SPEC; its gradient for two
    start                   a job's interpreter and libraries, once per job
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nrcg.config import ROLES, ClassifierConfig, Config, DatasetConfig, ExperimentConfig, MethodConfig, get_experiment
from nrcg.layout import DatasetPaths, ExperimentPaths, record_of

CHANNELS = 3
GRID_IMAGES = (16, 36)
"""Samples of a grid while a training goes on, and at its end."""
DIGITS = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)
"""Scikit-learn's images of each digit."""
PREVIEW_IMAGES = (4, 12)
"""Unguided and guided samples beside each grid of a training."""
"""Unguided samples in a training's grid."""
OVER_T = (21, 512)
"""Steps t, and validation images at each, of a classifier's accuracy over t."""

CELEBA_IMAGES = (162_770, 19_867)
"""CelebA's official splits, train and val."""

PASSES = {"unet_train": (1, 1), "unet_forward": (1, 0), "unet_gradient": (1, 1), "unet_checkpoint": (2, 1)}
"""What is counted -> passes of one image through the U-Net: forward, backward."""


@dataclass(frozen=True)
class Counts:
    """Images of a data set; None: not known before the data are there. `origin` says where the numbers come from."""

    train: int | None
    val: int | None
    origin: str = ""


@dataclass(frozen=True)
class Costs:
    """What a device needs for one image of what is counted.

    Attributes:
        seconds: What is counted -> seconds per image, of one core where the CPU computes.
        device: The device in words.
        cores: Cores of the CPU that computes, where jobs run side by side; None for a GPU, one job after the other.
        notes: How they were measured.
    """

    seconds: Mapping[str, float]
    device: str
    cores: int | None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Step:
    """All jobs of one row of the plan.

    Attributes:
        name: the row's name; its first word is the workflow's rule.
        jobs: number of jobs.
        images: drawn, read, or shown in training (again in each epoch); None: not known yet.
        work: what is counted -> how many images it is done with.
        disk: bytes that stay on disk; None: not known yet.
        threads: CPU threads a job can use.
        done: jobs whose results are there.
        bound: "<=": less may do; ">=": a part is not known yet.
    """

    name: str
    jobs: int
    images: int | None
    work: Mapping[str, float] = field(default_factory=dict)
    disk: int | None = 0
    threads: int = 1
    done: int = 0
    bound: str = ""

    @property
    def rule(self) -> str:
        return self.name.partition(" ")[0]

    @property
    def forward(self) -> int:
        """Forward passes of one image through the U-Net."""
        return round(sum(PASSES[name][0] * count for name, count in self.work.items() if name in PASSES))

    @property
    def backward(self) -> int:
        """Backward passes of one image through the U-Net."""
        return round(sum(PASSES[name][1] * count for name, count in self.work.items() if name in PASSES))

    def hours(self, costs: Costs) -> float | None:
        """Wall time in hours; None where the cost of something counted is not known."""
        if any(count and name not in costs.seconds for name, count in self.work.items()):
            return None
        seconds = sum(count * costs.seconds[name] for name, count in self.work.items() if count)
        return seconds / 3600 / (1 if costs.cores is None else min(costs.cores, self.jobs * self.threads))


def image_counts(data: DatasetConfig, paths: DatasetPaths) -> Counts:
    """Images per split: as drawn, as the data set on disk holds them, or CelebA's official numbers."""
    if data.source == "sportballs":
        return Counts(data.num_train, data.num_val)
    if data.source == "digits":
        val = sum(round(data.val_share * count) for count in DIGITS)
        return Counts(sum(DIGITS) - val, val)
    try:
        splits = json.loads(paths.manifest.read_text())["splits"]
        return Counts(splits["train"]["num_images"], splits["val"]["num_images"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not made yet; a damaged one is the dataset step's to report
    train, val = data.num_train, data.num_val
    if data.source == "celeba":
        train, val = (min(limit or there, there) for limit, there in zip((train, val), CELEBA_IMAGES, strict=True))
        return Counts(train, val, "images: CelebA's official splits, 162,770 and 19,867; the data are not there yet")
    if train is not None and val is not None:
        return Counts(train, val, "images: at most num_train and num_val; the data are not there yet")
    where = f"unknown until the data are there ({paths.folder}); what hangs on their number says ? or >="
    return Counts(train, val, f"images: {where}")


def shown(num_images: int, batch_size: int, epochs: int) -> int:
    """Images shown in a training: whole batches, the last and smaller one dropped unless it is the only one."""
    return epochs * max(num_images // batch_size * batch_size, min(num_images, batch_size))


def guided_steps(method: MethodConfig, num_steps: int, scale: float) -> tuple[int, int]:
    """Sampling steps, and those with a new gradient.

    DDPM's last step takes no guidance, since its variance is 0. `skip_above` saves more, which nobody knows before.
    """
    steps = method.sampler.evaluations(num_steps)
    guidable = steps - 1 if method.sampler.name in ("model", "ddpm") else steps
    if method.classifier is None or (scale == 0 and method.scale_schedule.name == "constant"):
        return steps, 0
    return steps, math.ceil(guidable / method.every_k)


def sampling_work(method: MethodConfig, num_steps: int, scale: float, classify: str) -> Counter[str]:
    """What one sample takes.

    Args:
        classify: What a pass through the guiding classifier counts as.
    """
    steps, gradients = guided_steps(method, num_steps, scale)
    through = {"full": "unet_gradient", "checkpoint": "unet_checkpoint"}.get(method.grad_mode)
    if method.input == "pred_x0" and through:
        return Counter({"unet_forward": steps - gradients}) + Counter({through: gradients})
    return Counter({"unet_forward": steps, classify: 2 * gradients})


def make_plan(
    config: Config,
    experiment: str,
    root: Path = Path(),
    counts: Counts | None = None,
    parameters: Mapping[str, int] | None = None,
) -> list[Step]:
    """The rows of the plan, in the order of the workflow.

    Args:
        config: The whole configuration.
        experiment: Name of the experiment.
        root: Folder of data/, models/ and results/: what is there counts as done.
        counts: Images of the data set; None: as `image_counts` finds them.
        parameters: `unet` and architectures of classifiers -> number of their parameters, where it is known.

    Raises:
        ConfigError: The experiment is unknown.
    """
    settings, paths = get_experiment(config, experiment), ExperimentPaths(experiment, root)
    data = DatasetPaths(settings.dataset.name, root)
    counts, parameters = counts or image_counts(settings.dataset, data), parameters or {}
    made = _there(paths.metrics, paths.figure("best_samples", "svg"), paths.report)  # collect, figures, report
    return [
        _dataset(settings, counts, data),
        _train_ddpm(settings, counts, paths, parameters.get("unet")),
        *(_train_classifier(settings, role, counts, paths, parameters) for role in ROLES),
        _forward(settings, counts, paths),
        *_likelihood(settings, counts, paths),
        *(_sample(settings, method, config.methods[method], paths) for method in settings.sweep),
        _reference(settings, counts, paths),
        _evaluate(settings, config.methods, paths),
        *_explanations(settings, paths),
        *_objectives(settings, config.methods, counts, paths, parameters.get("unet")),
        Step("report", 3, None, {"start": 3}, done=made),
    ]


def _dataset(settings: ExperimentConfig, counts: Counts, paths: DatasetPaths) -> Step:
    total = None if counts.train is None or counts.val is None else counts.train + counts.val
    # Drawing takes seconds; how long raw images take to read depends on their number, size and disk.
    reading = {} if settings.dataset.source == "sportballs" else {"convert": total or 1}
    disk = None if total is None else total * (settings.dataset.image_size**2 * CHANNELS + 8)
    return Step("dataset", 1, total, {"start": 1} | reading, disk, done=_there(paths.manifest))


def _train_ddpm(settings: ExperimentConfig, counts: Counts, paths: ExperimentPaths, parameters: int | None) -> Step:
    ddpm = settings.ddpm
    pretrained = ddpm.pretrained is not None
    epochs = 1 if pretrained else ddpm.epochs
    early = (epochs - 1) // ddpm.sample_every if ddpm.sample_every else 0
    forward = epochs * _at_most(ddpm.num_val_images, counts.val)
    forward += (GRID_IMAGES[1] + early * (GRID_IMAGES[0] + PREVIEW_IMAGES[0])) * ddpm.schedule.num_train_timesteps
    guided = early * PREVIEW_IMAGES[1] * ddpm.schedule.num_train_timesteps
    images = 0 if pretrained else None if counts.train is None else shown(counts.train, ddpm.batch_size, epochs)
    return Step(
        name="train_ddpm (pretrained)" if pretrained else "train_ddpm",
        jobs=1,
        images=images,
        work={"start": 1, "unet_train": images or 0, "unet_forward": forward, "unet_gradient": guided},
        disk=None if parameters is None else 4 * parameters,
        threads=16,
        done=_there(paths.ddpm / "training.json"),
        bound=">=" if images is None else "",
    )


def _train_classifier(
    settings: ExperimentConfig, role: str, counts: Counts, paths: ExperimentPaths, parameters: Mapping[str, int]
) -> Step:
    config: ClassifierConfig = getattr(settings.classifiers, role)
    points = min(OVER_T[0], settings.ddpm.schedule.num_train_timesteps + 1)
    val = counts.val or 0
    over_t = points * min(OVER_T[1], val)
    if config.pretrained is not None:  # imported, and its accuracy measured
        images, work = val + over_t, {_classify(config): val + over_t}
    else:
        images = None if counts.train is None else shown(counts.train, config.batch_size, config.epochs)
        work = {f"train {config.network}": images or 0, _classify(config): config.epochs * val + over_t}
    return Step(
        name=f"train_classifier {role}",
        jobs=1,
        images=images,
        work={"start": 1} | work,
        disk=4 * parameters.get(config.network, 0),
        done=_there(paths.classifier(role) / "config.json"),
        bound=">=" if images is None or counts.val is None else "",
    )


def _forward(settings: ExperimentConfig, counts: Counts, paths: ExperimentPaths) -> Step:
    """The gradients of both classifiers on x_t, and of the non-robust one through x0hat."""
    images = _at_most(settings.forward.num_images, counts.val)
    passes = images * settings.ddpm.schedule.num_train_timesteps * (2 if settings.forward.noise == "per_step" else 1)
    on_x_t = _sum({_classify(getattr(settings.classifiers, role)): 2 * passes} for role in ("robust", "non_robust"))
    work = {"start": 1, "unet_gradient": passes} | on_x_t
    return Step("forward", 1, images, work, done=_there(paths.forward))


def _likelihood(settings: ExperimentConfig, counts: Counts, paths: ExperimentPaths) -> list[Step]:
    """None where it is not measured."""
    config = settings.likelihood
    if config is None:
        return []
    images = _at_most(config.num_images, counts.val)
    shards = [paths.likelihood_shard(number) for number in range(config.num_shards)]
    work = {"start": len(shards)} | _likelihood_work(settings, images)
    return [Step("likelihood", len(shards), images, work, done=_there(*shards))]


def _likelihood_work(settings: ExperimentConfig, images: int) -> dict[str, float]:
    """A pass for each term; for the flow two gradients a step."""
    config, num_steps = settings.likelihood, settings.ddpm.schedule.num_train_timesteps
    terms = 1 + min(config.num_steps or num_steps, num_steps - 1)
    flow = 2 * num_steps * config.num_traces
    return {"unet_forward": images * terms, "unet_gradient": images * flow}


def _explanations(settings: ExperimentConfig, paths: ExperimentPaths) -> list[Step]:
    """Each way to explain, and its evaluation; none where nothing is explained. Searches take more."""
    config = settings.explain
    if config is None:
        return []
    images, num_steps = config.total_images, settings.ddpm.schedule.num_train_timesteps
    ways = [found for how in config.methods.values() if (found := how.settings()) is not None]
    legs = {"adversarial": 0, "affirmative": 2}
    steps = sum(legs.get(one.kind, 1) * one.tau * (one.num_inference_steps or num_steps) for one in ways)
    shards = [paths.explanation_shard(name, n) for name in config.methods for n in range(config.num_shards)]
    tables, count = list(map(paths.explainer_table, config.methods)), len(config.methods)
    work = {"start": len(shards), "unet_gradient": round(steps * images * config.num_runs)}
    bound = ">=" if any(one.search != "none" for one in ways) else ""
    return [
        Step("explain", len(shards), count * images * config.num_runs, work, done=_there(*shards), bound=bound),
        Step("evaluate_explanations", count, count * images, {"start": count}, done=_there(*tables)),
    ]


def _objectives(
    settings: ExperimentConfig,
    methods: Mapping[str, MethodConfig],
    counts: Counts,
    paths: ExperimentPaths,
    parameters: int | None,
) -> list[Step]:
    """Training and measuring each objective of the grid; none where there is no grid."""
    config = settings.objectives
    if config is None:
        return []
    own = _train_ddpm(settings, counts, paths, parameters)
    cells, method = list(config.cells), methods[config.method]
    classify = _classify(getattr(settings.classifiers, method.classifier or "non_robust"))
    num_steps = settings.ddpm.schedule.num_train_timesteps
    works = [sampling_work(method, num_steps, scale, classify) for scale in config.scales]
    works.append(Counter({"unet_forward": num_steps}))
    measured = _sum([{key: config.num_samples * count for key, count in work.items()} for work in works])
    measured.update(_likelihood_work(settings, _at_most(settings.likelihood.num_images, counts.val)))
    measured["unet_gradient"] += _at_most(settings.forward.num_images, counts.val) * num_steps
    trained = _there(*(paths.objective_ddpm(cell) / "training.json" for cell in cells))

    def times(work: Mapping[str, float]) -> dict[str, float]:
        return {key: len(cells) * count for key, count in work.items()} | {"start": len(cells)}

    drawn = len(cells) * config.num_samples * len(works)
    return [
        Step(
            name="train_objective",
            jobs=len(cells),
            images=None if own.images is None else len(cells) * own.images,
            work=times(own.work),
            disk=None if own.disk is None else len(cells) * own.disk,
            threads=own.threads,
            done=trained,
            bound=own.bound,
        ),
        Step("objective", len(cells), drawn, times(measured), done=_there(*map(paths.objective, cells))),
    ]


def _sample(settings: ExperimentConfig, name: str, method: MethodConfig, paths: ExperimentPaths) -> Step:
    scales, num_samples = settings.sweep[name], settings.sampling.num_samples
    num_steps = settings.ddpm.schedule.num_train_timesteps
    classify = _classify(getattr(settings.classifiers, method.classifier or "non_robust"))
    work = _sum(sampling_work(method, num_steps, scale, classify) for scale in scales)
    work = {counted: num_samples * count for counted, count in work.items()}
    disk = len(scales) * num_samples * settings.dataset.image_size**2 * CHANNELS
    if settings.sampling.trace and method.classifier:  # six float32 per sample and step
        disk += num_samples * 6 * 4 * sum(guided_steps(method, num_steps, scale)[0] for scale in scales if scale)
    shards = [paths.shard(name, scale, shard) for scale in scales for shard in range(settings.num_shards)]
    return Step(
        name=f"sample {name}",
        jobs=len(shards),
        images=len(scales) * num_samples,
        work={"start": len(shards)} | work,
        disk=disk,
        done=_there(*map(record_of, shards)),
        bound="<=" if method.skip_above < 1 else "",
    )


def _reference(settings: ExperimentConfig, counts: Counts, paths: ExperimentPaths) -> Step:
    """The judge's features of the training images, and the classifiers' accuracy on the validation images."""
    limits = [number for number in (settings.evaluation.num_reference, counts.train) if number is not None]
    images, val = min(limits, default=0), counts.val or 0
    roles = [{_classify(getattr(settings.classifiers, role)): val} for role in ROLES]
    work = {"start": 1} | _sum([{_classify(settings.classifiers.judge): images}, *roles])
    bound = "" if counts.train is not None else ">="
    return Step("reference", 1, images + len(ROLES) * val, work, done=_there(paths.reference), bound=bound)


def _evaluate(settings: ExperimentConfig, methods: Mapping[str, MethodConfig], paths: ExperimentPaths) -> Step:
    """The judge's features and answers, and the guide's answers, for every sample."""
    work: Counter[str] = Counter({"start": len(settings.sweep)})
    for name, scales in settings.sweep.items():
        drawn = len(scales) * settings.sampling.num_samples
        work[_classify(settings.classifiers.judge)] += 2 * drawn
        work[_classify(getattr(settings.classifiers, methods[name].classifier or "non_robust"))] += drawn
    images = sum(map(len, settings.sweep.values())) * settings.sampling.num_samples
    done = _there(*map(paths.method_metrics, settings.sweep))
    return Step("evaluate", len(settings.sweep), images, work, done=done)


def _classify(config: ClassifierConfig) -> str:
    """What a pass through a classifier counts as."""
    return f"classify {config.network}"


def _at_most(number: int, there: int | None) -> int:
    return number if there is None else min(number, there)


def _sum(works: Iterable[Mapping[str, float]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for work in works:
        total.update(work)
    return total


def _there(*paths: Path) -> int:
    return sum(path.exists() for path in paths)


def job_weights(steps: Sequence[Step]) -> dict[str, float]:
    """Relative cost of one job of each rule, for the estimate of what is left of a run: passes through the U-Net, a
    backward one for two, and at least one."""
    jobs = _sum({step.rule: step.jobs} for step in steps)
    cost = _sum({step.rule: step.forward + 2 * step.backward} for step in steps)
    return {rule: max(cost[rule] / jobs[rule], 1.0) for rule in jobs}
