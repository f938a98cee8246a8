"""What an experiment asks for before it starts: jobs, images, passes through the U-Net, time and disk.

Counting only, and no torch: `nrcg.timing` measures what one image costs. Whatever the pipeline does with an image many
times over is an operation with a name:

    draw                    one image drawn
    unet_train              one image of a training step
    unet_forward            one image through the U-Net
    unet_gradient           the same, and its gradient back to x_t
    unet_checkpoint         the same with gradient checkpointing: forward twice
    train ARCHITECTURE      one image of a classifier's training step
    classify ARCHITECTURE   one image through a classifier; for a pretrained one its SPEC
    gradient ARCHITECTURE   the same, and its gradient back to the image
    features EXTRACTOR      features of one image by another network than the judge
    start                   a job's interpreter and libraries, once per job
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nrcg.config import (
    ROLES,
    ClassifierConfig,
    Config,
    DatasetConfig,
    DDPMConfig,
    ExperimentConfig,
    MethodConfig,
    UNetConfig,
    get_experiment,
)
from nrcg.evaluation.features import resolve_features
from nrcg.layout import format_scale

CHANNELS = 3
GRID_IMAGES = 36
"""Unguided samples in a training's grid."""
OVER_T = (21, 512)
"""Steps t, and validation images at each, of a classifier's accuracy over t."""
CELEBA_IMAGES = {"train": 162_770, "val": 19_867}
"""CelebA's official splits."""
UNETS = {
    "google/ddpm-celebahq-256": UNetConfig(
        block_out_channels=[128, 128, 256, 256, 512, 512],
        attention=[False, False, False, False, True, False],
        layers_per_block=2,
        attention_head_dim=512,
        norm_num_groups=32,
        dropout=0.0,
    )
}
"""U-Nets of pretrained models that ship as an experiment, for as long as the model itself is not at hand."""
CLASSIFIER_PARAMETERS = {"mobilenet_v3_small": 1_520_000, "resnet18": 11_180_000, "small_cnn": 65_000}
"""Rounded; a head of few classes hardly counts."""
PASSES = {"unet_train": (1, 1), "unet_forward": (1, 0), "unet_gradient": (1, 1), "unet_checkpoint": (2, 1)}
"""Operation -> passes of one image through the U-Net: forward, backward."""
RELATIVE_COSTS = {"unet_train": 3, "unet_forward": 1, "unet_gradient": 3, "unet_checkpoint": 4} | {
    **{"train": 3 / 4, "classify": 1 / 4, "gradient": 3 / 4},
    **{"draw": 0.1, "features": 1, "start": 0},
}
"""First word of an operation -> rough cost in forward passes, where nothing was measured."""
UNKNOWN_TRAIN = 100_000
"""Training images assumed for relative costs while the data set is not there."""


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


def image_counts(data: DatasetConfig, folder: Path) -> Counts:
    """Images per split: as drawn, as the data set in `folder` holds them, or CelebA's official numbers."""
    if data.source == "sportballs":
        return Counts(data.num_train, data.num_val)
    try:
        splits = json.loads((folder / "dataset.json").read_text())["splits"]
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
        f"images: unknown until the data are there ({folder}); what hangs on their number says ? or >=",
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


def sampling_work(method: MethodConfig, architecture: str | None, num_steps: int, scale: float) -> dict[str, float]:
    """Operations for one sample.

    Args:
        architecture: the guiding classifier's.
        num_steps: T.
    """
    steps, gradients = guided_steps(method, num_steps, scale)
    if not gradients:
        return {"unet_forward": steps}
    through = {"full": "unet_gradient", "checkpoint": "unet_checkpoint", "no_jacobian": "unet_forward"}
    operation = "unet_forward" if method.input == "x_t" else through[method.grad_mode]
    return _sum({"unet_forward": steps - gradients}, {operation: gradients, f"gradient {architecture}": gradients})


def unet_parameters(unet: UNetConfig, channels: int = CHANNELS) -> int:
    """Parameters of diffusers' UNet2DModel as `nrcg.diffusion.unet.build_unet` makes it."""
    widths = unet.block_out_channels
    first, last = widths[0], widths[-1]

    def conv(inside: int, outside: int) -> int:
        return 9 * inside * outside + outside

    def linear(inside: int, outside: int) -> int:
        return inside * outside + outside

    def residual(inside: int, outside: int) -> int:
        norms, step = 2 * inside + 2 * outside, linear(4 * first, outside)
        shortcut = linear(inside, outside) if inside != outside else 0
        return norms + step + conv(inside, outside) + conv(outside, outside) + shortcut

    def attention(width: int) -> int:
        return 2 * width + 4 * linear(width, width)

    total = conv(channels, first) + linear(first, 4 * first) + linear(4 * first, 4 * first)
    total += 2 * residual(last, last) + attention(last)  # the middle
    total += 2 * first + conv(first, channels)
    before = first
    for level, width in enumerate(widths):
        for layer in range(unet.layers_per_block):
            total += residual(width if layer else before, width) + unet.attention[level] * attention(width)
        total += conv(width, width) if level < len(widths) - 1 else 0
        before = width
    for level in reversed(range(len(widths))):
        width = widths[level]
        for layer in range(unet.layers_per_block + 1):
            skip = width if layer < unet.layers_per_block else widths[max(level - 1, 0)]
            total += residual((width if layer else before) + skip, width) + unet.attention[level] * attention(width)
        total += conv(width, width) if level else 0
        before = width
    return total


def pretrained_source(ddpm: DDPMConfig) -> str | None:
    """The folder or hub id of a diffusion model that is taken instead of training one."""
    return ddpm.pretrained


def find_unet(ddpm: DDPMConfig, folder: Path) -> UNetConfig | None:
    """The U-Net that is trained, or that of a pretrained model: as `folder` (models/<experiment>/ddpm) or the local
    folder of the model says, or of a model in UNETS. None: not known before it is fetched."""
    source = pretrained_source(ddpm)
    if source is None:
        return ddpm.unet
    for place in (folder, Path(source)):
        try:
            raw = json.loads((place / "unet" / "config.json").read_text())
            return UNetConfig(
                block_out_channels=raw["block_out_channels"],
                attention=[name.startswith("Attn") for name in raw["down_block_types"]],
                layers_per_block=raw["layers_per_block"],
                attention_head_dim=raw["attention_head_dim"] or raw["block_out_channels"][-1],
                norm_num_groups=raw["norm_num_groups"],
                dropout=raw.get("dropout", 0.0),
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return UNETS.get(source.partition("@")[0])


def make_plan(config: Config, experiment: str, root: Path = Path(), counts: Counts | None = None) -> list[Step]:
    """The rows of the plan, in the order of the workflow.

    Args:
        root: folder of data/, models/ and results/: what is there counts as done.
        counts: images of the data set; None: as `image_counts` finds them.

    Raises:
        ConfigError: unknown experiment.
    """
    settings = get_experiment(config, experiment)
    counts = counts or image_counts(settings.dataset, root / "data" / settings.dataset.name)
    steps = [_dataset(settings, counts, root), _train_ddpm(experiment, settings, counts, root)]
    for role in ROLES:
        steps.append(_train_classifier(experiment, settings, role, counts, root))
    steps.append(_forward(experiment, settings, counts, root))
    for method, scales in settings.sweep.items():
        steps.append(_sample(experiment, settings, method, config.methods[method], scales, root))
    results = root / "results" / experiment
    steps.append(_reference(settings, counts, results))
    steps.append(_evaluate(settings, config.methods, results))
    made = ("metrics.csv", "figures/best_samples.svg", "report.html")  # collect, figures, report
    steps.append(Step("report", "report", 3, None, {"start": 3}, done=_there(*(results / name for name in made))))
    return steps


def _dataset(settings: ExperimentConfig, counts: Counts, root: Path) -> Step:
    data = settings.dataset
    total = None if counts.train is None or counts.val is None else counts.train + counts.val
    return Step(
        name="dataset",
        rule="dataset",
        jobs=1,
        images=total,
        # How long raw images take to read depends on their number, size and disk.
        work={"start": 1, "draw" if data.source == "sportballs" else "convert": 1 if total is None else total},
        disk=None if total is None else total * (data.image_size**2 * CHANNELS + 8),
        threads=4,
        done=_there(root / "data" / data.name / "dataset.json"),
    )


def _train_ddpm(experiment: str, settings: ExperimentConfig, counts: Counts, root: Path) -> Step:
    ddpm = settings.ddpm
    folder = root / "models" / experiment / "ddpm"
    pretrained = pretrained_source(ddpm) is not None
    epochs = 1 if pretrained else ddpm.epochs
    grids = 1 + ((epochs - 1) // ddpm.sample_every if ddpm.sample_every else 0)
    validated = ddpm.num_val_images if counts.val is None else min(ddpm.num_val_images, counts.val)
    forward = epochs * validated + grids * GRID_IMAGES * ddpm.schedule.num_train_timesteps
    images = 0 if pretrained else None if counts.train is None else shown(counts.train, ddpm.batch_size, epochs)
    unet = find_unet(ddpm, folder)
    return Step(
        name="train_ddpm (pretrained)" if pretrained else "train_ddpm",
        rule="train_ddpm",
        jobs=1,
        images=images,
        work={"start": 1, "unet_train": images or 0, "unet_forward": forward},
        disk=None if unet is None else 4 * unet_parameters(unet),
        threads=16,
        done=_there(folder / "training.json"),
        bound=">=" if images is None else "",
    )


def _train_classifier(experiment: str, settings: ExperimentConfig, role: str, counts: Counts, root: Path) -> Step:
    config: ClassifierConfig = getattr(settings.classifiers, role)
    images = None if counts.train is None else shown(counts.train, config.batch_size, config.epochs)
    points = min(OVER_T[0], settings.ddpm.schedule.num_train_timesteps + 1)
    val = counts.val or 0
    if config.pretrained is not None:
        # Imported, and its accuracy measured.
        return Step(
            name=f"train_classifier {role}",
            rule="train_classifier",
            jobs=1,
            images=val + points * min(OVER_T[1], val),
            work={"start": 1, f"classify {config.pretrained}": val + points * min(OVER_T[1], val)},
            done=_there(root / "models" / experiment / "classifiers" / role / "config.json"),
            bound=">=" if counts.val is None else "",
        )
    parameters = CLASSIFIER_PARAMETERS.get(config.architecture)
    return Step(
        name=f"train_classifier {role}",
        rule="train_classifier",
        jobs=1,
        images=images,
        work={
            "start": 1,
            f"train {config.architecture}": images or 0,
            f"classify {config.architecture}": config.epochs * val + points * min(OVER_T[1], val),
        },
        disk=None if parameters is None else 4 * parameters,
        done=_there(root / "models" / experiment / "classifiers" / role / "config.json"),
        bound=">=" if images is None or counts.val is None else "",
    )


def _forward(experiment: str, settings: ExperimentConfig, counts: Counts, root: Path) -> Step:
    images = settings.forward.num_images if counts.val is None else min(settings.forward.num_images, counts.val)
    num_steps = settings.ddpm.schedule.num_train_timesteps
    work: dict[str, float] = {"start": 1, "unet_gradient": images * num_steps}
    # Both classifiers on x_t, and the non-robust one on x0hat, at t = T..0.
    for role in ("robust", "non_robust", "non_robust"):
        architecture = _architecture(getattr(settings.classifiers, role))
        work = _sum(work, {f"gradient {architecture}": images * (num_steps + 1)})
    done = _there(root / "results" / experiment / "forward.csv")
    return Step("forward", "forward", 1, images, work, disk=0, done=done)


def _sample(
    experiment: str, settings: ExperimentConfig, name: str, method: MethodConfig, scales: Sequence[float], root: Path
) -> Step:
    num_samples, num_steps = settings.sampling.num_samples, settings.ddpm.schedule.num_train_timesteps
    guide = method.classifier and _architecture(getattr(settings.classifiers, method.classifier))
    jobs = len(scales) * settings.num_shards
    work: dict[str, float] = {"start": jobs}
    disk = len(scales) * num_samples * settings.dataset.image_size**2 * CHANNELS
    for scale in scales:
        one = sampling_work(method, guide, num_steps, scale)
        work = _sum(work, {operation: num_samples * count for operation, count in one.items()})
        if settings.sampling.trace and method.classifier and scale:
            disk += num_samples * guided_steps(method, num_steps, scale)[0] * 6 * 4  # six float32 per sample and step
    folder = root / "results" / experiment / "samples" / name
    shards = (
        folder / f"scale{format_scale(scale)}" / f"shard{shard:04d}.json"
        for scale in scales
        for shard in range(settings.num_shards)
    )
    return Step(
        name=f"sample {name}",
        rule="sample",
        jobs=jobs,
        images=len(scales) * num_samples,
        work=work,
        disk=disk,
        done=_there(*shards),
        bound="<=" if method.skip_above < 1 else "",
    )


def _extractors(settings: ExperimentConfig) -> list[str]:
    """Operations that give an image's features, one for each protocol."""
    names = resolve_features(settings.evaluation.features, settings.evaluation.inception_dir)
    judge = f"classify {_architecture(settings.classifiers.judge)}"
    return [judge if name == "judge" else f"features {name}" for name in names]


def _reference(settings: ExperimentConfig, counts: Counts, results: Path) -> Step:
    """Features of the training images, and the classifiers' accuracy and calibration on the validation images."""
    limits = [number for number in (settings.evaluation.num_reference, counts.train) if number is not None]
    images, val = min(limits, default=0), counts.val or 0
    work: dict[str, float] = {"start": 1}
    for extractor in _extractors(settings):
        work = _sum(work, {extractor: images})
    for role in ROLES:
        work = _sum(work, {f"classify {_architecture(getattr(settings.classifiers, role))}": val})
    return Step(
        name="reference",
        rule="reference",
        jobs=1,
        images=images + len(ROLES) * val,
        work=work,
        done=_there(results / "reference.json"),
        bound="" if counts.train is not None else ">=",
    )


def _evaluate(settings: ExperimentConfig, methods: Mapping[str, MethodConfig], results: Path) -> Step:
    """Features of the samples, and their accuracies by guide and judge."""
    judge = f"classify {_architecture(settings.classifiers.judge)}"
    work: dict[str, float] = {"start": len(settings.sweep)}
    images = 0
    for name, scales in settings.sweep.items():
        guide = _architecture(getattr(settings.classifiers, methods[name].classifier or "non_robust"))
        drawn = len(scales) * settings.sampling.num_samples
        for operation in (*_extractors(settings), judge, f"classify {guide}"):
            work = _sum(work, {operation: drawn})
        images += drawn
    return Step(
        name="evaluate",
        rule="evaluate",
        jobs=len(settings.sweep),
        images=images,
        work=work,
        done=_there(*(results / "metrics" / f"{name}.csv" for name in settings.sweep)),
    )


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


def job_weights(config: Config, experiment: str) -> dict[str, float]:
    """Relative cost of one job of each rule, in forward passes of one image through the U-Net: for the estimate of
    what is left of a run."""
    settings = get_experiment(config, experiment)
    counts = image_counts(settings.dataset, Path("data") / settings.dataset.name)
    if counts.train is None or counts.val is None:
        counts = Counts(counts.train or UNKNOWN_TRAIN, counts.val or UNKNOWN_TRAIN // 10)
    jobs: dict[str, int] = {}
    cost: dict[str, float] = {}
    for step in make_plan(config, experiment, counts=counts):
        jobs[step.rule] = jobs.get(step.rule, 0) + step.jobs
        each = {name: RELATIVE_COSTS.get(name.split()[0], 0.1) for name in step.work}
        cost[step.rule] = cost.get(step.rule, 0) + sum(count * each[name] for name, count in step.work.items())
    return {rule: max(cost[rule] / jobs[rule], 1.0) for rule in jobs}


@dataclass(frozen=True)
class Estimate:
    """What a device needs for one image of each operation.

    Attributes:
        costs: operation -> seconds per image, of one core where the CPU computes.
        device: in words.
        cores: of the CPU that computes, None for a GPU.
        notes: how it was measured.
    """

    costs: Mapping[str, float]
    device: str
    cores: int | None
    notes: Sequence[str] = ()


HEADER = ("step", "jobs", "done", "images", "U-Net forward", "backward")


def plan_rows(steps: Sequence[Step], estimate: Estimate | None) -> list[tuple[str, ...]]:
    """The table's cells, header and total with it."""
    hours = [] if estimate is None else ["hours" if estimate.cores else "GPU hours"]
    rows = [(*HEADER, *hours, "disk")]
    for step in steps:
        bound = f"{step.bound} " if step.bound else ""
        cells = [step.name, f"{step.jobs:,}", f"{step.done:,}", "" if step.rule == "report" else _count(step.images)]
        cells += [f"{bound}{_count(count)}" if count else "" for count in (step.forward, step.backward)]
        if estimate is not None:
            found = step.hours(estimate.costs, estimate.cores)
            unknown = found is None or (step.images is None and step.rule != "report")
            cells.append("?" if unknown else f"{bound}{_hours(found)}")
        rows.append((*cells, "?" if step.disk is None else _bytes(step.disk) if step.disk else ""))
    total = ["all", f"{sum(s.jobs for s in steps):,}", f"{sum(s.done for s in steps):,}", ""]
    for count in (sum(s.forward for s in steps), sum(s.backward for s in steps)):
        total.append(_total_bound(steps) + _count(count))
    if estimate is not None:
        found, complete = total_hours(steps, estimate)
        total.append(("" if complete else ">= ") + _hours(found))
    known = sum(step.disk or 0 for step in steps)
    total.append((">= " if any(step.disk is None for step in steps) else "") + _bytes(known))
    return [*rows, tuple(total)]


def total_hours(steps: Sequence[Step], estimate: Estimate, left: bool = False) -> tuple[float, bool]:
    """Hours of all steps, or of the jobs that are not done; and whether every step's are known."""
    total, complete = 0.0, True
    for step in steps:
        share = 1 - step.done / step.jobs if left else 1.0
        hours = step.hours(estimate.costs, estimate.cores)
        complete &= not share or (hours is not None and step.bound != ">=")
        total += share * (hours or 0.0)
    return total, complete


def plan_notes(
    settings: ExperimentConfig, steps: Sequence[Step], estimate: Estimate | None, counts: Counts, root: Path = Path()
) -> list[str]:
    """What stands below the table: how sure the numbers are, what is left to do, and warnings."""
    notes = [counts.origin] if counts.origin else []
    if any(step.bound == "<=" for step in steps):
        notes.append("<=: at most; how much skip_above saves is not known before")
    if pretrained_source(settings.ddpm) is None:
        size = _bytes(16 * unet_parameters(settings.ddpm.unet))  # weights, two moments and the weight EMA in float32
        notes.append(f"disk: while the diffusion model trains, {size} more for its checkpoint")
    if estimate is not None:
        notes += estimate.notes
        if any(step.hours(estimate.costs, estimate.cores) is None for step in steps):
            notes.append("?: not known before, and not in the sum of the hours")
        hours, complete = total_hours(steps, estimate)
        sign = "" if complete else "at least "
        notes.append(f"time: {sign}{duration(hours)} on {estimate.device}, if nothing else runs there")
        done, jobs = sum(step.done for step in steps), sum(step.jobs for step in steps)
        if done:
            left, complete = total_hours(steps, estimate, left=True)
            sign = "" if complete else "at least "
            notes.append(f"done: {done:,} of {jobs:,} jobs have results; the rest takes {sign}{duration(left)}")
        if estimate.cores is not None and hours > 12:
            notes.append(f"warning: no GPU is used: on this device this takes {duration(hours)}")
    needed = sum((step.disk or 0) * (1 - step.done / step.jobs) for step in steps)
    free = shutil.disk_usage(root).free
    if needed > free:
        notes.append(f"warning: {_bytes(round(needed))} of disk are needed, {_bytes(free)} are free here")
    return notes


def duration(hours: float) -> str:
    """Hours in words, two digits: 40 seconds, 22 minutes, 3.5 hours, 12 days, 5.2 years."""
    year = 24 * 365.25
    for unit, size, least in (
        ("years", year, 2 * year),
        ("days", 24.0, 48.0),
        ("hours", 1.0, 1.5),
        ("minutes", 1 / 60, 1.5 / 60),
    ):
        if hours >= least:
            return f"{_digits(hours / size)} {unit}"
    return f"{_digits(hours * 3600)} seconds"


def _digits(number: float) -> str:
    """Two significant digits, more before the point."""
    return f"{number:,.0f}" if number >= 9.95 else f"{number:.2g}"


def _hours(hours: float) -> str:
    decimals = 0 if hours >= 99.5 else 1 if hours >= 9.95 else 2 if hours >= 0.0995 else 3
    return f"{hours:,.{decimals}f}"


def _count(count: int | None) -> str:
    """Exact below 100,000, else three digits and k, M or G (1e9)."""
    if count is None:
        return "?"
    if count < 100_000:
        return f"{count:,}"
    for letter, size in (("k", 1e3), ("M", 1e6), ("G", 1e9)):
        if count < 999.5 * size or letter == "G":
            return f"{count / size:,.{0 if count >= 99.95 * size else 1}f} {letter}"
    raise AssertionError("unreachable")


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= 0.995 * size:
            return f"{_digits(count / size)} {unit}"
    return f"{math.ceil(count / 1e3)} kB"


def _total_bound(steps: Sequence[Step]) -> str:
    """A sum is a bound where all of its bounds are of one kind."""
    kinds = {step.bound for step in steps if step.bound and (step.forward or step.rule == "train_ddpm")}
    return f"{kinds.pop()} " if len(kinds) == 1 else "about " if kinds else ""
