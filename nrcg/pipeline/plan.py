"""What an experiment asks for before it starts: jobs, images, passes through the U-Net, time and disk.

Counting only, and no torch: `nrcg.pipeline.timing` measures what an image costs. What is counted has a name:

    unet_train              one image of a training step
    unet_forward            one image through the U-Net
    unet_gradient           the same, with the gradient of a classifier back to x_t
    unet_checkpoint         the same with gradient checkpointing: forward twice
    train ARCHITECTURE      one image of a classifier's training step
    classify ARCHITECTURE   one image through a classifier; for a pretrained one its SPEC
    start                   a job's interpreter and libraries, once per job
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nrcg.config import ROLES, ClassifierConfig, Config, DatasetConfig, ExperimentConfig, MethodConfig, get_experiment
from nrcg.layout import DatasetPaths, ExperimentPaths, record_of

CHANNELS = 3
GRID_IMAGES = 36
"""Unguided samples in a training's grid."""
OVER_T = (21, 512)
"""Steps t, and validation images at each, of a classifier's accuracy over t."""

CELEBA_IMAGES = {"train": 162_770, "val": 19_867}
"""CelebA's official splits."""

PASSES = {"unet_train": (1, 1), "unet_forward": (1, 0), "unet_gradient": (1, 1), "unet_checkpoint": (2, 1)}
"""What is counted -> passes of one image through the U-Net: forward, backward."""


@dataclass(frozen=True)
class Counts:
    """Images of a data set; None: not known before the data are there. `origin` says where the numbers come from."""

    train: int | None
    val: int | None
    origin: str = ""


@dataclass(frozen=True)
class Step:
    """All jobs of one row of the plan.

    Attributes:
        name: the row's name.
        rule: the workflow's rule.
        jobs: number of jobs.
        images: drawn, read, or shown in training (again in each epoch); None: not known yet.
        work: operation -> how many images it is done with.
        disk: bytes that stay on disk; None: not known yet.
        threads: CPU threads a job can use.
        done: jobs whose results are there.
        bound: "<=": less may do; ">=": a part is not known yet.
    """

    name: str
    rule: str
    jobs: int
    images: int | None
    work: Mapping[str, float] = field(default_factory=dict)
    disk: int | None = 0
    threads: int = 1
    done: int = 0
    bound: str = ""

    @property
    def forward(self) -> int:
        """Forward passes of one image through the U-Net."""
        return round(sum(PASSES[name][0] * count for name, count in self.work.items() if name in PASSES))

    @property
    def backward(self) -> int:
        """Backward passes of one image through the U-Net."""
        return round(sum(PASSES[name][1] * count for name, count in self.work.items() if name in PASSES))

    def hours(self, costs: Mapping[str, float], cores: int | None) -> float | None:
        """Wall time in hours; None where an operation's cost is not known.

        Args:
            costs: operation -> seconds per image, of one core where the CPU computes.
            cores: of the CPU that computes: jobs run side by side; None: one GPU, one job after the other.
        """
        if any(count and name not in costs for name, count in self.work.items()):
            return None
        seconds = sum(count * costs[name] for name, count in self.work.items() if count)
        return seconds / 3600 / (1 if cores is None else min(cores, self.jobs * self.threads))


def image_counts(data: DatasetConfig, paths: DatasetPaths) -> Counts:
    """Images per split: as drawn, as the data set on disk holds them, or CelebA's official numbers."""
    if data.source == "sportballs":
        return Counts(data.num_train, data.num_val)
    try:
        splits = json.loads(paths.manifest.read_text())["splits"]
        return Counts(splits["train"]["num_images"], splits["val"]["num_images"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not made yet; a damaged one is the dataset step's to report
    limits = {"train": data.num_train, "val": data.num_val}
    if data.source == "celeba":
        train, val = (min(CELEBA_IMAGES[split], limits[split] or CELEBA_IMAGES[split]) for split in ("train", "val"))
        return Counts(train, val, "images: CelebA's official splits, 162,770 and 19,867; the data are not there yet")
    if None not in limits.values():
        return Counts(*limits.values(), "images: at most num_train and num_val; the data are not there yet")
    return Counts(
        *limits.values(),
        f"images: unknown until the data are there ({paths.folder}); what hangs on their number says ? or >=",
    )


def shown(num_images: int, batch_size: int, epochs: int) -> int:
    """Images shown in a training: whole batches, the last and smaller one dropped unless it is the only one."""
    return epochs * max(num_images // batch_size * batch_size, min(num_images, batch_size))


def guided_steps(method: MethodConfig, num_steps: int, scale: float) -> tuple[int, int]:
    """Sampling steps, and those with a new gradient.

    DDPM's last step takes no guidance, since its variance is 0. `skip_above` saves more, which nobody knows before.
    """
    steps = min(method.sampler.steps or num_steps, num_steps)
    guidable = steps - 1 if method.sampler.name in ("model", "ddpm") else steps
    if method.classifier is None or (scale == 0 and method.scale_schedule.name == "constant"):
        return steps, 0
    return steps, math.ceil(guidable / method.every_k)


def sampling_work(method: MethodConfig, num_steps: int, scale: float) -> dict[str, float]:
    """What one sample takes. With `x_t` or `no_jacobian`, the classifier's own gradient hardly counts."""
    steps, gradients = guided_steps(method, num_steps, scale)
    if not gradients:
        return {"unet_forward": steps}
    through = {"full": "unet_gradient", "checkpoint": "unet_checkpoint", "no_jacobian": "unet_forward"}
    counted = "unet_forward" if method.input == "x_t" else through[method.grad_mode]
    return _sum({"unet_forward": steps - gradients}, {counted: gradients})


def make_plan(
    config: Config, experiment: str, root: Path = Path(), counts: Counts | None = None, parameters: int | None = None
) -> list[Step]:
    """The rows of the plan, in the order of the workflow.

    Args:
        config: The whole configuration.
        experiment: Name of the experiment.
        root: Folder of data/, models/ and results/: what is there counts as done.
        counts: Images of the data set; None: as `image_counts` finds them.
        parameters: Of the U-Net; None: not known, and with it the disk that its weights take.

    Raises:
        ConfigError: The experiment is unknown.
    """
    settings, paths = get_experiment(config, experiment), ExperimentPaths(experiment, root)
    data = DatasetPaths(settings.dataset.name, root)
    counts = counts or image_counts(settings.dataset, data)
    steps = [_dataset(settings, counts, data), _train_ddpm(settings, counts, paths, parameters)]
    steps += [_train_classifier(settings, role, counts, paths) for role in ROLES]
    steps.append(_forward(settings, counts, paths))
    for method, scales in settings.sweep.items():
        steps.append(_sample(settings, method, config.methods[method], scales, paths))
    steps.append(_reference(settings, counts, paths))
    steps.append(_evaluate(settings, config.methods, paths))
    made = _there(paths.metrics, paths.figure("best_samples", "svg"), paths.report)  # collect, figures, report
    steps.append(Step("report", "report", 3, None, {"start": 3}, done=made))
    return steps


def _dataset(settings: ExperimentConfig, counts: Counts, paths: DatasetPaths) -> Step:
    total = None if counts.train is None or counts.val is None else counts.train + counts.val
    return Step(
        name="dataset",
        rule="dataset",
        jobs=1,
        images=total,
        # Drawing takes seconds; how long raw images take to read depends on their number, size and disk.
        work={"start": 1} if settings.dataset.source == "sportballs" else {"start": 1, "convert": total or 1},
        disk=None if total is None else total * (settings.dataset.image_size**2 * CHANNELS + 8),
        done=_there(paths.manifest),
    )


def _train_ddpm(settings: ExperimentConfig, counts: Counts, paths: ExperimentPaths, parameters: int | None) -> Step:
    ddpm = settings.ddpm
    pretrained = ddpm.pretrained is not None
    epochs = 1 if pretrained else ddpm.epochs
    grids = 1 + ((epochs - 1) // ddpm.sample_every if ddpm.sample_every else 0)
    validated = ddpm.num_val_images if counts.val is None else min(ddpm.num_val_images, counts.val)
    forward = epochs * validated + grids * GRID_IMAGES * ddpm.schedule.num_train_timesteps
    images = 0 if pretrained else None if counts.train is None else shown(counts.train, ddpm.batch_size, epochs)
    return Step(
        name="train_ddpm (pretrained)" if pretrained else "train_ddpm",
        rule="train_ddpm",
        jobs=1,
        images=images,
        work={"start": 1, "unet_train": images or 0, "unet_forward": forward},
        disk=None if parameters is None else 4 * parameters,
        threads=16,
        done=_there(paths.ddpm / "training.json"),
        bound=">=" if images is None else "",
    )


def _train_classifier(settings: ExperimentConfig, role: str, counts: Counts, paths: ExperimentPaths) -> Step:
    config: ClassifierConfig = getattr(settings.classifiers, role)
    points = min(OVER_T[0], settings.ddpm.schedule.num_train_timesteps + 1)
    val = counts.val or 0
    over_t = points * min(OVER_T[1], val)
    if config.pretrained is not None:  # imported, and its accuracy measured
        images, work = val + over_t, {f"classify {config.pretrained}": val + over_t}
    else:
        images = None if counts.train is None else shown(counts.train, config.batch_size, config.epochs)
        work = {
            f"train {config.architecture}": images or 0,
            f"classify {config.architecture}": config.epochs * val + over_t,
        }
    return Step(
        name=f"train_classifier {role}",
        rule="train_classifier",
        jobs=1,
        images=images,
        work={"start": 1} | work,
        done=_there(paths.classifier(role) / "config.json"),
        bound=">=" if images is None or counts.val is None else "",
    )


def _forward(settings: ExperimentConfig, counts: Counts, paths: ExperimentPaths) -> Step:
    images = settings.forward.num_images if counts.val is None else min(settings.forward.num_images, counts.val)
    num_steps = settings.ddpm.schedule.num_train_timesteps
    # Both classifiers on x_t, which hardly count, and the non-robust one on x0hat.
    work = {"start": 1, "unet_gradient": images * num_steps}
    return Step("forward", "forward", 1, images, work, done=_there(paths.forward))


def _sample(
    settings: ExperimentConfig, name: str, method: MethodConfig, scales: Sequence[float], paths: ExperimentPaths
) -> Step:
    num_samples, num_steps = settings.sampling.num_samples, settings.ddpm.schedule.num_train_timesteps
    work: dict[str, float] = {"start": len(scales) * settings.num_shards}
    disk = len(scales) * num_samples * settings.dataset.image_size**2 * CHANNELS
    for scale in scales:
        one = sampling_work(method, num_steps, scale)
        work = _sum(work, {counted: num_samples * count for counted, count in one.items()})
        if settings.sampling.trace and method.classifier and scale:
            disk += num_samples * guided_steps(method, num_steps, scale)[0] * 6 * 4  # six float32 per sample and step
    shards = [paths.shard(name, scale, shard) for scale in scales for shard in range(settings.num_shards)]
    return Step(
        name=f"sample {name}",
        rule="sample",
        jobs=len(shards),
        images=len(scales) * num_samples,
        work=work,
        disk=disk,
        done=_there(*map(record_of, shards)),
        bound="<=" if method.skip_above < 1 else "",
    )


def _reference(settings: ExperimentConfig, counts: Counts, paths: ExperimentPaths) -> Step:
    """The judge's features of the training images, and the classifiers' accuracy on the validation images."""
    limits = [number for number in (settings.evaluation.num_reference, counts.train) if number is not None]
    images, val = min(limits, default=0), counts.val or 0
    work: dict[str, float] = _sum({"start": 1}, {f"classify {_architecture(settings.classifiers.judge)}": images})
    for role in ROLES:
        work = _sum(work, {f"classify {_architecture(getattr(settings.classifiers, role))}": val})
    return Step(
        name="reference",
        rule="reference",
        jobs=1,
        images=images + len(ROLES) * val,
        work=work,
        done=_there(paths.reference),
        bound="" if counts.train is not None else ">=",
    )


def _evaluate(settings: ExperimentConfig, methods: Mapping[str, MethodConfig], paths: ExperimentPaths) -> Step:
    """The judge's features and answers, and the guide's answers, for every sample."""
    work: dict[str, float] = {"start": len(settings.sweep)}
    images = 0
    for name, scales in settings.sweep.items():
        guide = getattr(settings.classifiers, methods[name].classifier or "non_robust")
        drawn = len(scales) * settings.sampling.num_samples
        work = _sum(work, {f"classify {_architecture(settings.classifiers.judge)}": 2 * drawn})
        work = _sum(work, {f"classify {_architecture(guide)}": drawn})
        images += drawn
    done = _there(*map(paths.method_metrics, settings.sweep))
    return Step("evaluate", "evaluate", len(settings.sweep), images, work, done=done)


def _architecture(config: ClassifierConfig) -> str:
    """What a classifier's passes cost: its architecture, or the SPEC of a pretrained one."""
    return config.pretrained or config.architecture


def _sum(*works: Mapping[str, float]) -> dict[str, float]:
    total: dict[str, float] = {}
    for work in works:
        for name, count in work.items():
            total[name] = total.get(name, 0) + count
    return total


def _there(*paths: Path) -> int:
    return sum(path.exists() for path in paths)


def job_weights(steps: Sequence[Step]) -> dict[str, float]:
    """Relative cost of one job of each rule, for the estimate of what is left of a run: passes through the U-Net, a
    backward one for two, and at least one."""
    jobs: dict[str, int] = {}
    cost: dict[str, float] = {}
    for step in steps:
        jobs[step.rule] = jobs.get(step.rule, 0) + step.jobs
        cost[step.rule] = cost.get(step.rule, 0) + step.forward + 2 * step.backward
    return {rule: max(cost[rule] / jobs[rule], 1.0) for rule in jobs}


@dataclass(frozen=True)
class Costs:
    """What a device needs for one image of what is counted.

    Attributes:
        seconds: What is counted -> seconds per image, of one core where the CPU computes.
        device: The device in words.
        cores: Cores of the CPU that computes, None for a GPU.
        notes: How they were measured.
    """

    seconds: Mapping[str, float]
    device: str
    cores: int | None
    notes: Sequence[str] = ()
