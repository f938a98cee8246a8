"""Evaluation of samples: accuracies, distances to real images, diversity, each with its 95 % interval.

`evaluate_images` takes anybody's images; `evaluate_method` applies it to the samples of a method of the pipeline.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nrcg import metrics, tracking
from nrcg.classifiers import Classifier, class_index, load_classifier
from nrcg.config import ROLES, EvaluateStep, ReferenceStep, SampleStep, format_scale
from nrcg.datasets import load_manifest, open_split, to_unit
from nrcg.errors import DataError
from nrcg.features import Extractor, extract, load_extractor, resolve_features
from nrcg.figures import sample_grid, save_png, save_trace_figure
from nrcg.files import read_record
from nrcg.intervals import Estimate, bootstrap_intervals, share, share_difference
from nrcg.pairwise import (
    across,
    fixed_choice,
    kernel_estimate,
    mean_pair_distance,
    neighbour_estimates,
    require_neighbours,
    within,
)
from nrcg.progress import Progress
from nrcg.references import Reference, ReferenceSet, cached_reference, make_reference
from nrcg.results import check_comparable
from nrcg.shards import read_shard, weights_hash
from nrcg.trace import Trace

GRID_SAMPLES = 64
BATCH = 256


@dataclass(frozen=True)
class SampleSet:
    """Samples of one method and scale, joined from its shards.

    Attributes:
        images: (N, H, W, C) uint8.
        nonfinite: samples that turned non-finite.
        images_per_second: over all shards.
        peak_memory_mib: the largest shard's.
    """

    images: np.ndarray
    nonfinite: int
    images_per_second: float
    peak_memory_mib: float


def setting_folder(samples: Path, method: str, scale: float) -> Path:
    return samples / method / f"scale{format_scale(scale)}"


def read_samples(folder: Path, num_samples: int, expected: Mapping[str, object] | None = None) -> SampleSet:
    """Join the shards of a setting, checked against their records.

    Args:
        num_samples: expected; shards past them, left by an earlier and larger run, are not read.
        expected: what must have made them (`nrcg.shards.read_shard`).

    Raises:
        DataError: a shard or its record is missing, damaged, does not belong to the other, or something else made it.
    """
    paths = sorted(folder.glob("shard*.npy"))
    if not paths:
        raise DataError(f"{folder}: holds no shard*.npy; run: snakemake --cores all --resources gpu=1")
    parts, records = [], []
    for path in paths:
        if sum(map(len, parts)) >= num_samples:
            break
        images, record = read_shard(path, expected)
        parts.append(images)
        records.append(record)
    firsts = [record["first_sample"] for record in records]
    expected = np.cumsum([0, *(len(part) for part in parts[:-1])]).tolist()
    if firsts != expected:
        raise DataError(f"{folder}: its shards begin at samples {firsts}, expected {expected}; delete the folder")
    images = np.concatenate(parts)
    if len(images) != num_samples:
        raise DataError(f"{folder}: its shards hold {len(images)} samples, expected {num_samples}; delete the folder")
    seconds = sum(record["seconds"] for record in records)
    return SampleSet(
        images=images,
        nonfinite=sum(record["nonfinite"] for record in records),
        images_per_second=len(images) / seconds,
        peak_memory_mib=max(record["peak_memory_mib"] for record in records),
    )


# --- Anybody's images ----------------------------------------------------------------------------------------------


def evaluate_images(
    samples: np.ndarray | Iterable[np.ndarray],
    references: Sequence[Reference],
    extractors: Sequence[Extractor],
    *,
    target: int | None = None,
    judge: Classifier | None = None,
    guide: Classifier | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[int], object] | None = None,
) -> dict[str, float | str]:
    """Every metric of a set of samples, from one pass over them.

    Args:
        samples: (N, H, W, C) uint8, or an iterable of such arrays, N in all.
        references: one per extractor, in its order (`nrcg.references.make_reference`). The first is the headline: its
            precision, recall and so on carry no suffix.
        extractors: the protocols.
        target: the class that was aimed at, for judge and guide. A reference of `make_reference` knows its own.
        judge, guide: classifiers that score the samples; None leaves out what they say.
        seed: of the bootstrap.
        device: of the pairwise products; extractors and classifiers stay where they are.
        progress: called with the number of samples done, after every batch.

    Returns:
        A row: each metric NAME with its 95 % interval NAME_lo, NAME_hi (docs/evaluation.md), the counts of images,
        and the texts `protocols` and `reference`, which must be equal for two rows to be comparable.

    Raises:
        DataError: too few samples, or an extractor of another protocol than its reference.
    """
    for extractor, reference in zip(extractors, references, strict=True):
        theirs = getattr(extractor, "protocol", "unknown")
        if (extractor.name, theirs) != (reference.name, reference.protocol):
            raise DataError(
                f"the reference was made by {reference.name} ({reference.protocol}), the samples' features by "
                f"{extractor.name} ({theirs}): they cannot be compared"
            )
    if (judge is not None or guide is not None) and target is None:
        raise ValueError("judge and guide need a target")
    features: list[list[np.ndarray]] = [[] for _ in extractors]
    hits: dict[str, list[np.ndarray]] = {"guide": [], "judge": []}
    done = 0
    for batch in _batches(samples):
        for found, extractor in zip(features, extractors, strict=True):
            found.append(extract(extractor, batch))
        for name, classifier in (("guide", guide), ("judge", judge)):
            if classifier is not None:
                hits[name].append(metrics.class_hits(predict(classifier, batch), target))
        done += len(batch)
        if progress is not None:
            progress(done)
    if done < 2:
        raise DataError(f"an evaluation needs at least 2 samples, got {done}")
    return evaluate_features(
        [np.concatenate(found) for found in features],
        references,
        hits={name: np.concatenate(parts) for name, parts in hits.items() if parts},
        seed=seed,
        device=device,
    )


def evaluate_features(
    features: Sequence[np.ndarray],
    references: Sequence[Reference],
    *,
    hits: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> dict[str, float | str]:
    """The row of `evaluate_images` from features that were extracted before.

    Args:
        features: (N, dim) of the samples, one array per reference.
        references: as there.
        hits: `guide` and `judge` to (N,) bool: which samples that classifier takes for the target.
        seed, device: as there.

    Raises:
        DataError: too few samples, or features that are not finite.
    """
    done = len(features[0])
    if done < 2:
        raise DataError(f"an evaluation needs at least 2 samples, got {done}")
    scored = dict(hits or {})
    estimates = {f"accuracy_{name}": share(hit) for name, hit in scored.items()}
    if len(scored) == 2:
        estimates["accuracy_gap"] = share_difference(scored["guide"], scored["judge"])
    for position, (found, reference) in enumerate(zip(features, references, strict=True)):
        estimates |= feature_estimates(
            found,
            reference,
            suffix="" if position == 0 else f"_{reference.name}",
            chosen=scored.get("judge"),
            device=device,
        )
    intervals = bootstrap_intervals(estimates, seed=seed)
    everything, target_set = references[0].everything, references[0].target
    row: dict[str, float | str] = {
        "num_samples": done,
        "num_reference": everything.statistics.n,
        "num_reference_target": target_set.statistics.n if target_set else 0,
        "num_pairwise": min(done, references[0].num_pairwise or done),
    }
    for name, estimate in estimates.items():
        row |= _with_interval(name, estimate.value, intervals[name])
    for kind, column in (("protocol", "protocols"), ("reference", "reference")):
        row[column] = " | ".join(dict.fromkeys(reference.identity[kind] for reference in references))
    return row


def _with_interval(name: str, value: float, interval: Sequence[float]) -> dict[str, float]:
    return {name: value, f"{name}_lo": interval[0], f"{name}_hi": interval[1]}


def _batches(samples: np.ndarray | Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for images in [samples] if isinstance(samples, np.ndarray) else samples:
        for first in range(0, len(images), BATCH):
            yield images[first : first + BATCH]


def feature_estimates(
    features: np.ndarray,
    reference: Reference,
    *,
    suffix: str = "",
    chosen: np.ndarray | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Estimate]:
    """The feature metrics of one protocol, by column name.

    features: (N, dim) of the samples. suffix: of the names that do not hold the protocol's already. chosen: (N,)
    bool, the samples whose diversity is measured, those that the judge takes for the target; None: all.

    Pairwise metrics take `reference.num_pairwise` samples, a fixed random choice. Without a target class
    the class-conditional columns are left out. Raises DataError with too few images.
    """
    names = metrics.metric_names(reference.name)
    statistics = metrics.FeatureStatistics.from_features(features)
    compared = fixed_choice(len(features), reference.num_pairwise)
    few = features if len(compared) == len(features) else features[compared]
    chosen = np.ones(len(few), bool) if chosen is None else np.asarray(chosen, bool)[compared]
    pairs = within(few, chosen=chosen, device=device)
    found: dict[str, Estimate] = {}

    def compare(real: ReferenceSet, frechet: str, kernel: str, ending: str, keep: Sequence[str]) -> None:
        require_neighbours(len(few), len(real.features))
        found[frechet] = metrics.frechet_estimate(features, statistics, real.statistics, real.factor)
        between = across(few, real.features, pairs, real.pairs, device=device)
        found[kernel] = kernel_estimate(pairs, real.pairs, between)
        near = neighbour_estimates(real.pairs, between)
        found.update({f"{name}{ending}{suffix}": near[name] for name in keep})

    shares = ("precision", "recall", "density", "coverage")
    if reference.target is None:
        compare(reference.everything, names.frechet, names.kernel, "", (*shares, "off_manifold"))
    else:
        compare(reference.everything, names.frechet, names.kernel, "_all", shares)
        compare(reference.target, names.class_frechet, names.class_kernel, "", (*shares, "off_manifold"))
    spread = mean_pair_distance(pairs, chosen)
    unit = reference.distance or np.nan  # equal images have no diversity to be held against
    influence = None if spread.influence is None else spread.influence / unit
    found[f"diversity{suffix}"] = Estimate(spread.value / unit, influence, low=0.0)
    return found


def predict(classifier: Classifier, images: np.ndarray) -> np.ndarray:
    """(N, K) float32 logits of (N, H, W, C) uint8 images."""
    parameter = next(classifier.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    logits = []
    with torch.no_grad():
        for first in range(0, len(images), BATCH):
            logits.append(classifier(to_unit(images[first : first + BATCH]).to(device)).float().cpu())
    return torch.cat(logits).numpy()


def classifier_quality(classifier: Classifier, images: np.ndarray, labels: np.ndarray, seed: int = 0) -> dict:
    """How far a classifier can be believed on clean images: `clean_accuracy` and `ece` (`metrics.calibration_error`),
    each [value, lo, hi]; Wilson's interval and a percentile bootstrap of 200 replicates."""
    logits = predict(classifier, images)
    binary = logits.shape[1] == 1
    correct = ((logits[:, 0] > 0).astype(int) if binary else logits.argmax(axis=1)) == labels
    accuracy = share(correct)
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(labels), size=len(labels)) for _ in range(200))
    replicates = [metrics.calibration_error(logits[drawn], labels[drawn]) for drawn in draws]
    value = metrics.calibration_error(logits, labels)
    low, high = np.quantile(replicates, [0.025, 0.975])
    return {
        "clean_accuracy": [accuracy.value, *accuracy.interval],
        "ece": [value, min(value, float(low)), max(value, float(high))],
        "num_images": len(labels),
    }


# --- The pipeline's methods ----------------------------------------------------------------------------------------


def open_references(
    settings: ReferenceStep | EvaluateStep,
    data: Path,
    judge: Classifier,
    cache: Path,
    device: torch.device,
    progress: Callable[[int], object] = lambda images: None,
) -> tuple[list[Extractor], list[Reference]]:
    """The configured protocols, and the training images as each of them sees them: from the cache, else made.

    The images of the target class in the validation split are what diversity is held against.
    """
    config = settings.evaluation
    target = class_index(judge.classes, settings.target)
    manifest = load_manifest(data)
    images, labels = open_split(data, "train")
    held_out, held_out_labels = open_split(data, "val")
    count = len(images) if config.num_reference is None else min(config.num_reference, len(images))
    sums = {split: manifest["splits"][split]["sha256"]["images"] for split in ("train", "val")}
    described = (
        f"{manifest['name']}, training images 0..{count - 1}, class {settings.target}, sha256 {sums['train'][:12]}"
    )
    extractors, references = [], []
    for spec in resolve_features(config.features, config.inception_dir):
        extractor = load_extractor(spec, weights_dir=config.inception_dir, judge=judge, device=device)
        extractors.append(extractor)

        def make(extractor: Extractor = extractor) -> Reference:
            return make_reference(
                extractor,
                images[:count],
                labels[:count],
                target,
                held_out=held_out[held_out_labels == target],
                num_pairwise=config.num_pairwise,
                described=described,
                device=device,
                progress=lambda done, _: progress(done),
            )

        key = {
            "name": extractor.name,
            "protocol": extractor.protocol,
            "images": described,
            "sha256": sums,
            "labels": manifest["splits"]["train"]["sha256"]["labels"],
            "target": target,
            "num_pairwise": config.num_pairwise,
        }
        references.append(cached_reference(cache, key, make))
    return extractors, references


def describe_reference(
    settings: ReferenceStep, data: Path, classifiers: Path, cache: Path, device: torch.device
) -> dict[str, object]:
    """Make what every method is compared with, and say what it is: for reference.json.

    Returns:
        protocols: a dict per protocol; classifiers: role -> `classifier_quality` on the validation images.
    """
    images, labels = open_split(data, "val")
    loaded = {role: load_classifier(classifiers / role).to(device) for role in ROLES}
    with Progress(f"reference {settings.experiment}", len(open_split(data, "train")[0]), "image") as bar:
        extractors, references = open_references(settings, data, loaded["judge"], cache, device, bar.set)
    for extractor, reference in zip(extractors, references, strict=True):
        if reference.target is not None:
            _warn_of_rank(f"{extractor.name}, target class", reference.target.statistics.n, extractor.dim)
    return {
        "protocols": [{"name": one.name, "dim": one.everything.statistics.dim, **one.identity} for one in references],
        "classifiers": {role: classifier_quality(one, images, labels) for role, one in loaded.items()},
    }


def read_reference_record(path: Path) -> dict:
    """reference.json as `describe_reference` made it. Raises DataError when it is missing or damaged."""
    try:
        record = read_record(path)
        for role in ROLES:
            if len(record["classifiers"][role]["ece"]) != 3 or len(record["classifiers"][role]["clean_accuracy"]) != 3:
                raise ValueError("not [value, lo, hi]")
        return record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: no record of the references ({error}); run: snakemake --cores all --force {path.as_posix()}"
        ) from None


def _warn_of_rank(what: str, count: int, dim: int) -> None:
    warning = metrics.rank_warning(count, dim)
    if warning:
        print(f"{what}: {warning}", flush=True)


def evaluate_method(
    settings: EvaluateStep,
    samples: Path,
    data: Path,
    classifiers: Path,
    scales: list[float],
    device: torch.device,
    *,
    record: Mapping,
    cache: Path,
    traces: Path,
    ddpm: Path | None = None,
) -> tuple[list[dict], list[str]]:
    """Metrics of a method's samples at each scale, logged as one tracking run per scale.

    `accuracy_guide` is graded by the classifier that guided (self-graded), by the non-robust one where none did;
    `accuracy_judge` by the judge, which never guides.

    Args:
        samples: results/<experiment>/samples.
        data: data/<dataset>.
        classifiers: models/<experiment>/classifiers.
        record: of `describe_reference`: how good the classifiers are on clean images.
        cache: folder of the references, made anew where they are missing.
        traces: folder for the pictures of what the guidance did, where the settings asked for a trace.
        ddpm: models/<experiment>/ddpm; None does not ask which weights drew the samples.

    Returns:
        A row per scale and the columns' names.

    Raises:
        DataError: samples are damaged, or not what these settings and weights draw.
    """
    judge = load_classifier(classifiers / "judge").to(device)
    guide_role = settings.guidance.classifier or "non_robust"
    guide = load_classifier(classifiers / guide_role).to(device)
    target = class_index(judge.classes, settings.target)
    manifest = load_manifest(data)
    extractors, references = open_references(settings, data, judge, cache, device)
    made_by = {"method": settings.method, "settings": sample_settings(settings).fingerprint()}
    if ddpm is not None:
        made_by["weights_sha256"] = {"ddpm": weights_hash(ddpm)}
        if settings.guidance.classifier is not None:
            made_by["weights_sha256"]["classifier"] = weights_hash(classifiers / guide_role)
    quality = {}
    for name, role in (("judge", "judge"), ("guide", guide_role)):
        for measure, (value, *interval) in (
            (key, record["classifiers"][role][key]) for key in ("clean_accuracy", "ece")
        ):
            quality |= _with_interval(f"{name}_{measure}", value, interval)
    rows = []
    with Progress(f"evaluate {settings.method}", settings.sampling.num_samples * len(scales), "image") as bar:
        for number, scale in enumerate(scales):
            folder = setting_folder(samples, settings.method, scale)
            drawn = read_samples(folder, settings.sampling.num_samples, made_by | {"scale": scale})
            before = number * len(drawn.images)
            row = {"experiment": settings.experiment, "method": settings.method, "scale": scale}
            row |= evaluate_images(
                drawn.images,
                references,
                extractors,
                target=target,
                judge=judge,
                guide=guide,
                device=device,
                progress=lambda done, before=before: bar.set(before + done),
            )
            row |= quality
            row |= {
                "nonfinite": drawn.nonfinite,
                "images_per_second": drawn.images_per_second,
                "peak_memory_mib": drawn.peak_memory_mib,
            }
            trace = _read_trace(folder, settings)
            if trace is not None:
                traces.mkdir(parents=True, exist_ok=True)
                save_trace_figure(traces / f"trace_scale{format_scale(scale)}.png", trace)
            row["mlflow_run_id"] = _log(settings, row, drawn.images, manifest, trace)
            rows.append(row)
    check_comparable(rows)
    for extractor in extractors:
        _warn_of_rank(extractor.name, min(row["num_samples"] for row in rows), extractor.dim)
    return rows, list(rows[0])


def sample_settings(settings: EvaluateStep) -> SampleStep:
    """What the samples that are evaluated must have been drawn by."""
    return SampleStep(**{name: getattr(settings, name) for name in SampleStep.model_fields})


def _read_trace(folder: Path, settings: EvaluateStep) -> Trace | None:
    """What the guidance did in each step, over all shards, where the settings asked for it."""
    paths = sorted(folder.glob("shard*.trace.npz")) if settings.sampling.trace else []
    if not paths:
        return None  # not asked for, or nothing guided
    num_shards = -(-settings.sampling.num_samples // settings.sampling.shard_size)
    return Trace.join([Trace.load(path) for path in paths[:num_shards]])


def _log(settings: EvaluateStep, row: dict, images: np.ndarray, manifest: dict, trace: Trace | None) -> str:
    """One tracking run per method and scale; returns its id."""
    params = {
        "scale": row["scale"],
        "method": settings.method,
        "target": settings.target,
        "protocols": row["protocols"],
        "reference": row["reference"],
        "sampling": settings.sampling.model_dump(),
        "guidance": settings.guidance.model_dump(),
    }
    name = f"{settings.method} scale {format_scale(row['scale'])}"
    tags = {"dataset": manifest["name"], "method": settings.method}
    with tracking.run(settings.experiment, name, kind="sample", params=params, tags=tags) as run:
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "scale"}
        finite = {key: value for key, value in numbers.items() if np.isfinite(value)}
        run.log_metrics(finite, step=tracking.scale_step(row["scale"]))
        with tempfile.TemporaryDirectory() as folder:
            save_png(Path(folder) / "samples.png", sample_grid(images[:GRID_SAMPLES], 8))
            run.log_artifact(Path(folder) / "samples.png")
            if trace is not None:
                save_trace_figure(Path(folder) / "trace.png", trace)
                run.log_artifact(Path(folder) / "trace.png")
        if trace is not None:
            means = trace.mean()
            for column, t in enumerate(trace.t.tolist()):
                known = {f"trace.{name}": values[column] for name, values in means.items()}
                run.log_metrics({name: value for name, value in known.items() if np.isfinite(value)}, step=t)
        return run.id
