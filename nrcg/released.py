"""The paper's released files: found in a clone of its repository, checked, and written in the form of our own.

Three kinds of files are known, wherever they lie below the clone's folder:

    model_index.json, unet/, scheduler/   a diffusers pipeline, whatever class it names  -> <experiment>/ddpm/
    *.safetensors, keys `classifier.*`    a MobileNetV3 small inside a wrapper           -> <experiment>/classifiers/
    *.pt with real_sum, real_cov_sum, ... a torcheval FID's reference statistics         -> <experiment>/reference/

Everything is read and checked before anything is written.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nrcg.classifiers.adapter import Classifier
from nrcg.classifiers.storage import CONFIG_FILE, save_classifier
from nrcg.config import ROLES, ExperimentConfig
from nrcg.csv_files import write_csv
from nrcg.data.arrays import load_manifest, mean_image, open_split, to_uint8, to_unit
from nrcg.data.pictures import sample_grid, save_png
from nrcg.diffusion.noise import sample_noise
from nrcg.diffusion.schedule import Schedule
from nrcg.diffusion.storage import DATA_MEAN_FILE
from nrcg.errors import ConfigError, DataError
from nrcg.evaluation.frechet import FeatureStatistics
from nrcg.files import atomic_save_array, atomic_write_text, replace_folder, sha256_file, temporary_name
from nrcg.foreign import (
    STATISTICS_KEYS,
    WEIGHTS,
    ReleasedClassifier,
    ReleasedDDPM,
    damaged,
    load_pt,
    part_folder,
    read_classifier,
    read_ddpm,
    read_json,
    read_torcheval_state,
    refuse_pointer,
)
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.training import ddpm

if TYPE_CHECKING:
    from diffusers import DDPMScheduler


IMAGE_SIZES = {"celeba": 64, "sportballs": 64, "celebahq": 256}
"""Images' height and width of each published experiment."""
CLASSES = {
    "celeba": ("female", "male"),
    "celebahq": ("female", "male"),
    "sportballs": ("baseball", "basketball", "volleyball", "soccer"),
}
"""Classes in the order of the released classifiers' labels. CelebA's are the values 0 and 1 of its attribute Male."""
CLASSIFIER_FILES = {
    "classic-aardvark-104": ("celeba", "non_robust"),
    "golden-leaf-103": ("celeba", "robust"),
    "light-dew-109": ("sportballs", "non_robust"),
    "apricot-galaxy-108": ("sportballs", "robust"),
    "summer-snowflake-110": ("celebahq", "non_robust"),
}
"""Names of the classifiers that the released sampling script loads: they do not say what they are."""
UNUSED_FILES = ("sleek-river-105", "upbeat-leaf-106")
"""Classifiers of SportBalls that the released analysis scripts load, but not the sampling."""
TENSOR_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
NUM_LOSS_IMAGES = 64
"""Validation images of the imported diffusion model's loss."""
NUM_GRID_STEPS = 50


@dataclass(frozen=True)
class Item:
    """A released model or statistics, and what it is.

    Attributes:
        path: the file; of a diffusion model the folder.
        role: ddpm, one of ROLES, or reference.
        class_name: of reference statistics: whose images; None: all.
    """

    path: Path
    experiment: str
    role: str
    class_name: str | None = None

    @property
    def target(self) -> Path:
        """Below models/."""
        if self.role == "ddpm":
            return Path(self.experiment) / "ddpm"
        if self.role == "reference":
            name = "_".join(filter(None, ("fid_torcheval", self.class_name)))
            return Path(self.experiment) / "reference" / f"{name}.npz"
        return Path(self.experiment) / "classifiers" / self.role


@dataclass(frozen=True)
class Assignment:
    """`FILE=EXPERIMENT/ROLE`, what the user says a file is; experiment None: to be ignored."""

    experiment: str | None
    role: str | None = None
    class_name: str | None = None


def parse_assignment(text: str, root: Path) -> tuple[Path, Assignment]:
    """A file and what it is, from `FILE=EXPERIMENT/ROLE` or `FILE=ignore`.

    Args:
        text: FILE is relative to `root` or to the working folder; ROLE is ddpm, robust, non_robust, judge, reference or
            reference:CLASS.

    Raises:
        ConfigError: another form, or no such file.
    """
    name, equals, meaning = text.rpartition("=")
    found = next((path for path in (root / name, Path(name)) if name and path.exists()), None)
    if equals and found is None:
        raise ConfigError(f"--assign {text}: {name} is not there, neither below {root} nor here")
    match = re.fullmatch(r"([A-Za-z]\w*)/(ddpm|robust|non_robust|judge|reference(?::([\w-]+))?)", meaning)
    if not equals or not (match or meaning == "ignore"):
        raise ConfigError(
            f"--assign {text}: expected FILE=EXPERIMENT/ROLE with ROLE ddpm, robust, non_robust, judge, reference or "
            "reference:CLASS; or FILE=ignore"
        )
    if found.name == "model_index.json":
        found = found.parent
    if match is None:
        return found.resolve(), Assignment(None)
    return found.resolve(), Assignment(match[1], match[2].partition(":")[0], match[3])


def _experiments_in(name: str) -> set[str]:
    """Published experiments that a file's or folder's name speaks of."""
    name = name.lower()
    if re.search(r"celeba[-_. ]?hq|(?<![a-z])hq(?![a-z])", name):
        return {"celebahq"}
    found = {"celeba"} if "celeba" in name else set()
    return found | ({"sportballs"} if re.search(r"sport[-_. ]?balls?|(?<![a-z])balls?(?![a-z])", name) else set())


def _roles_in(name: str) -> set[str]:
    name = name.lower()
    if re.search(r"non[-_. ]?robust|(?<![a-z])clean(?![a-z])", name):
        return {"non_robust"}
    return {"robust"} if re.search(r"robust|nois(y|ed)(?![a-z])", name) else set()


def _nearest(parts: Sequence[str], read: Any) -> str | None:
    """What the name nearest to the file says; None where none does, or one says two things."""
    for part in reversed(parts):
        found = read(part)
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def _class_of(path: Path, classes: Sequence[str]) -> str | None:
    """Whose images statistics are about, by their file's name: a class's name, or classI or classI_J.

    I is a class's number, or where there is no such class the number of an attribute (CelebA's Male is 20) whose value
    is J, 0 where J is missing.

    Raises:
        ValueError: a class that is not there.
    """
    words = re.split(r"[^a-z0-9]+", path.stem.lower())
    for name in classes:
        if name.lower() in words:
            return name
    match = re.search(r"class_?(\d+)(?:_(\d+))?(?!\d)", path.stem.lower())
    if match is None:
        if "class" in path.stem.lower():
            raise ValueError("which class?")
        return None
    number = int(match[1]) if int(match[1]) < len(classes) else int(match[2] or 0)
    if number >= len(classes):
        raise ValueError("no such class")
    return classes[number]


@dataclass
class Plan:
    """What is imported, and what is not and why."""

    items: list[Item] = field(default_factory=list)
    ignored: list[tuple[Path, str]] = field(default_factory=list)


def find_released(
    root: Path,
    *,
    assign: Sequence[str] = (),
    classes: Mapping[str, Sequence[str]] | None = None,
) -> Plan:
    """Search a folder for released files and decide what each is, by its name and by those of its folders.

    Args:
        root: a clone of the repository, or any folder with such files.
        assign: see `parse_assignment`; goes before names.
        classes: class names by experiment, instead of CLASSES.

    Raises:
        ConfigError: an assignment that cannot be read.
        DataError: nothing there, a damaged file, or one of which it cannot be decided what it is. One line.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give a clone of the paper's repository")
    told = dict(parse_assignment(text, root) for text in assign)
    classes = CLASSES | dict(classes or {})
    plan, undecided, claimed = Plan(), [], set()
    for path, kind in _search(root, told, plan.ignored):
        said = told.get(path.resolve())
        if said is not None:
            claimed.add(path.resolve())
            if (kind == "classifier") != (said.role in ROLES) or (kind != "classifier" and kind != said.role):
                raise ConfigError(f"--assign {path}={said.experiment}/{said.role}: the file is a {kind}")
            plan.items.append(Item(path, said.experiment, said.role, said.class_name))
            continue
        parts = [root.resolve().name, *path.relative_to(root).parts]
        if kind == "classifier" and path.stem in UNUSED_FILES:
            plan.ignored.append((path, "the released sampling does not use it; --assign it to import it"))
            continue
        experiment = _nearest(parts, _experiments_in)
        role: str | None = kind
        if kind == "classifier":
            role = _nearest(parts, _roles_in)
            if path.stem in CLASSIFIER_FILES:
                experiment, role = CLASSIFIER_FILES[path.stem]
        if kind == "ddpm":
            size = read_json(part_folder(path, "unet") / "config.json").get("sample_size")
            if experiment is None and size == IMAGE_SIZES["celebahq"]:
                experiment = "celebahq"
        class_name = None
        if kind == "reference" and experiment is not None:
            try:
                class_name = _class_of(path, classes[experiment])
            except ValueError:
                role = None
        if experiment is None or role is None:
            undecided.append(path)
        else:
            plan.items.append(Item(path, experiment, role, class_name))
    for path in told.keys() - claimed:
        if told[path].experiment is not None:
            raise ConfigError(f"--assign {path}: no diffusers folder, classifier or torcheval state")
    if undecided:
        names = ", ".join(str(path.relative_to(root)) for path in undecided)
        example = "ddpm" if undecided[0].is_dir() else {".pt": "reference"}.get(undecided[0].suffix, "robust")
        raise DataError(
            f"{root}: cannot tell from the path what these are: {names}; say it by --assign FILE=EXPERIMENT/ROLE "
            "(ROLE: ddpm, robust, non_robust, reference, reference:CLASS) or FILE=ignore, for example "
            f"--assign {undecided[0].relative_to(root)}=celeba/{example}"
        )
    if not plan.items:
        raise DataError(
            f"{root}: holds no diffusers folder, no classifier (*.safetensors with keys `classifier.*`) and no "
            "torcheval state (*.pt)"
        )
    targets: dict[Path, Path] = {}
    for item in plan.items:
        if item.target in targets:
            raise DataError(
                f"{item.path} and {targets[item.target]} would both become {item.target}; leave one out: "
                f"--assign {item.path.relative_to(root)}=ignore"
            )
        targets[item.target] = item.path
    return plan


def _search(root: Path, told: Mapping[Path, Assignment], ignored: list[tuple[Path, str]]) -> list[tuple[Path, str]]:
    """Everything that can be imported, with its kind (ddpm, classifier, reference); the rest goes to `ignored`."""
    found: list[tuple[Path, str]] = []
    parts_of_pipelines: set[Path] = set()
    for name, folders, files in os.walk(root):
        folder = Path(name)
        # .git holds Git LFS's own copies.
        folders[:] = sorted(entry for entry in folders if not entry.startswith("."))
        if folder in parts_of_pipelines:
            folders.clear()
            continue
        own: set[str] = set()
        if "model_index.json" in files:
            if told.get(folder.resolve(), Assignment("")).experiment is None:
                ignored.append((folder, "as --assign says"))
            else:
                found.append((folder, "ddpm"))
            # Classifiers and statistics may lie beside these in the pipeline's folder.
            parts_of_pipelines |= {folder / part for part in ("unet", "scheduler")}
            own = set(WEIGHTS)  # old pipelines keep their weights here
        for file in sorted(set(files) - own):
            path = folder / file
            if path.suffix not in TENSOR_FILES:
                continue
            if told.get(path.resolve(), Assignment("")).experiment is None:
                ignored.append((path, "as --assign says"))
                continue
            kind, why = _kind(path)
            if kind is None:
                ignored.append((path, why))
            else:
                found.append((path, kind))
    return found


def _kind(path: Path) -> tuple[str | None, str]:
    """classifier or reference; else None and the reason."""
    refuse_pointer(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                keys = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise damaged(path, error) from None
        if keys and all(key.startswith("classifier.") for key in keys):
            return "classifier", ""
        return None, "not all keys start with `classifier.`"
    if path.suffix != ".pt":
        return None, "no *.safetensors or *.pt"
    state = load_pt(path)
    if isinstance(state, dict) and state.keys() >= STATISTICS_KEYS:
        return "reference", ""
    return None, "no torcheval state: real_sum, real_cov_sum or num_real_images is missing"


@dataclass
class Imported:
    """What an import did, or in a dry run would do.

    Attributes:
        rows: kind, source, target, what was found.
        ignored: path, reason.
        notes: what the user should know, a line each.
    """

    rows: list[tuple[str, str, str, str]]
    ignored: list[tuple[str, str]]
    notes: list[str]


def import_released(
    root: Path,
    models: Path,
    *,
    data: Path,
    experiments: Mapping[str, ExperimentConfig],
    assign: Sequence[str] = (),
    classes: Mapping[str, Sequence[str]] | None = None,
    device: torch.device | None = None,
    versions: Mapping[str, str] | None = None,
    replace: bool = False,
    dry_run: bool = False,
) -> Imported:
    """Find, check and write all released files below a folder.

    With an experiment's data set at hand its models are measured on the validation images, and every file is written
    that the workflow asks of a model, so that it does not train one.

    Args:
        root: a clone of the paper's repository.
        models: the folder models/.
        data: the folder data/.
        experiments: of config.yaml; an experiment that is not among them is imported without data.
        assign: see `parse_assignment`.
        classes: class names by experiment, instead of CLASSES.
        device: that measures; None: the CPU.
        versions: of the software, for the records.
        replace: also in the place of models that were trained here.
        dry_run: read and check, write nothing.

    Raises:
        ConfigError, DataError: one line; nothing was written.
    """
    classes = dict(classes or {})
    sizes = IMAGE_SIZES | {name: config.dataset.image_size for name, config in experiments.items()}
    plan = find_released(root, assign=assign, classes=classes)
    device = device or torch.device("cpu")
    done = Imported([], [(str(path.relative_to(root)), why) for path, why in plan.ignored], [])
    read: list[tuple[Item, Any, list[str] | None]] = []
    for item in plan.items:
        config = experiments.get(item.experiment)
        if not replace:
            _keep_trained(models / item.target, item)
        if item.experiment not in sizes:
            raise ConfigError(f"experiment {item.experiment!r} is unknown; allowed: {', '.join(sizes)}")
        names = None
        if item.role == "ddpm":
            content: Any = read_ddpm(item.path)
            what = _describe_ddpm(content, item, sizes[item.experiment])
            done.notes += [f"{item.path.relative_to(root)}: {change}" for change in content.changes]
            done.notes += _schedule_note(content.scheduler, item.experiment, config)
        elif item.role == "reference":
            content = read_torcheval_state(item.path)
            what = f"{content.n} images of {item.class_name or 'all classes'}"
        else:
            content = read_classifier(item.path)
            names = _class_names(item, content, classes, config)
            what = f"MobileNetV3 small, {_logits(content)}: {', '.join(names)}; images in [-1, 1]"
        read.append((item, content, names))
        kind = item.role if item.role in ("ddpm", "reference") else f"classifier {item.role}"
        done.rows.append((kind, str(item.path.relative_to(root)), str(models / item.target), what))
    done.notes += _class_notes(read, experiments)
    if dry_run:
        return done
    for item, content, names in read:
        config, target = experiments.get(item.experiment), models / item.target
        origin = {"path": str(item.path), "sha256": getattr(content, "sha256", None) or sha256_file(item.path)}
        if item.role == "reference":
            _write_reference(target, content, item, origin)
            continue
        folder = _data_folder(data, config, sizes[item.experiment])
        record = {"imported": origin, "versions": dict(versions or {})}
        if item.role == "ddpm":
            done.notes += _write_ddpm(target, content, folder, record, device)
        else:
            schedule = None if config is None else Schedule.from_config(config.ddpm.schedule)
            size = sizes[item.experiment]
            done.notes += _write_classifier(target, content, item, names, size, folder, schedule, record, device)
    done.notes += _data_notes(read, data, experiments, sizes)
    return done


def _keep_trained(target: Path, item: Item) -> None:
    """Refuse to replace a model that was not imported."""
    record = target / ("training.json" if item.role == "ddpm" else CONFIG_FILE)
    if item.role == "reference" or not target.exists():
        return
    if record.exists() and "imported" in read_json(record):
        return
    raise DataError(f"{target}: holds a model that was trained here; move it away, or say --replace")


def _describe_ddpm(ddpm: ReleasedDDPM, item: Item, image_size: int) -> str:
    size = ddpm.unet.config.sample_size
    if size != image_size:
        raise DataError(
            f"{item.path}: sample_size {size}, but {item.experiment} has images of {image_size}; say what it is: "
            f"--assign {item.path}=EXPERIMENT/ddpm"
        )
    count = sum(parameter.numel() for parameter in ddpm.unet.parameters())
    shape = f"{size} x {size} x {ddpm.unet.config.in_channels}"
    return f"U-Net {shape}, {count / 1e6:.1f} M parameters, T = {len(ddpm.scheduler.betas)}"


def _schedule_note(scheduler: DDPMScheduler, experiment: str, config: ExperimentConfig | None) -> list[str]:
    """A line where config.yaml has another schedule than the imported model."""
    if config is None:
        return [f"config.yaml has no experiment {experiment}: its ddpm.schedule was not compared"]
    ours, theirs = Schedule.from_config(config.ddpm.schedule), Schedule.from_scheduler(scheduler)
    if ours.num_steps == theirs.num_steps and torch.allclose(ours.abar, theirs.abar, rtol=1e-4, atol=0):
        return []
    betas = scheduler.betas
    return [
        f"config.yaml: experiments.{experiment}.ddpm.schedule is not the imported model's, which has "
        f"num_train_timesteps {theirs.num_steps}, beta_start {float(betas[0]):.6g}, beta_end {float(betas[-1]):.6g} "
        f"({scheduler.config.beta_schedule}): set it to that"
    ]


def _logits(classifier: ReleasedClassifier) -> str:
    return "1 logit" if classifier.num_logits == 1 else f"{classifier.num_logits} logits"


def _class_names(
    item: Item, classifier: ReleasedClassifier, classes: Mapping[str, Sequence[str]], config: ExperimentConfig | None
) -> list[str]:
    """Names of a classifier's classes: as told, as released, or the data set's, whichever are as many."""
    needed, example = max(classifier.num_logits, 2), f"--classes {item.experiment}=NAME,NAME"
    told = classes.get(item.experiment)
    if told is not None and len(told) != needed:
        raise ConfigError(
            f"--classes: {len(told)} names for {item.experiment}, but {item.path} has {_logits(classifier)}, so "
            f"{needed} classes"
        )
    for names in (told, CLASSES.get(item.experiment), config and config.dataset.classes):
        if names is not None and len(names) == needed:
            return list(names)
    raise DataError(f"{item.path}: the names of its {needed} classes are not known; give them: {example}")


def _class_notes(
    read: Sequence[tuple[Item, Any, list[str] | None]], experiments: Mapping[str, ExperimentConfig]
) -> list[str]:
    """A line per experiment: the order of its classes, and where the data set has another."""
    notes = []
    for experiment, names in {item.experiment: names for item, _, names in read if names is not None}.items():
        listed = ", ".join(names)
        config = experiments.get(experiment)
        if config is not None and config.dataset.classes != names:
            ours = ", ".join(config.dataset.classes)
            notes.append(
                f"config.yaml: experiments.{experiment}.dataset.classes is [{ours}], but the imported classifiers have "
                f"[{listed}]: set it to that before using them in the workflow"
            )
        else:
            notes.append(
                f"{experiment}: classes are taken to be {listed}, in this order, which the files do not say: check the "
                f"accuracy, or say --classes {experiment}=NAME,NAME"
            )
    return notes


def _data_folder(data: Path, config: ExperimentConfig | None, image_size: int) -> Path | None:
    """The experiment's data set where there is one of the right size."""
    folder = data / config.dataset.name if config is not None else None
    if folder is None or not (folder / "dataset.json").exists():
        return None
    return folder if load_manifest(folder)["image_size"] == image_size else None


def _data_notes(
    read: Sequence[tuple[Item, Any, list[str] | None]],
    data: Path,
    experiments: Mapping[str, ExperimentConfig],
    sizes: Mapping[str, int],
) -> list[str]:
    """A line per experiment without its data set: what that costs."""
    notes = []
    for experiment in dict.fromkeys(item.experiment for item, _, _ in read if item.role != "reference"):
        config = experiments.get(experiment)
        if _data_folder(data, config, sizes[experiment]) is None:
            where = data / config.dataset.name if config is not None else data
            notes.append(
                f"{where}: {experiment} has no data set there: no data_mean.npy (so no `start: data_mean`) and no "
                "measured accuracy, and the workflow would train in the place of these models; make the data set, "
                "then import again"
            )
    return notes


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` when it is whole, and leaves nothing behind otherwise."""
    new = temporary_name(folder)
    new.mkdir(parents=True)
    try:
        yield new
        replace_folder(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write_reference(path: Path, statistics: FeatureStatistics, item: Item, origin: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    statistics.save(path)
    record = {"protocol": "torcheval", "class": item.class_name, "num_images": statistics.n, "imported": origin}
    record["sha256"] = sha256_file(path)
    atomic_write_text(path.with_suffix(".json"), json.dumps(record, indent=2) + "\n")


def _write_ddpm(folder: Path, ddpm: ReleasedDDPM, data: Path | None, record: dict, device: torch.device) -> list[str]:
    """The folder as `nrcg train-ddpm` leaves it: data_mean.npy, training.csv and samples.png where there is data.

    Returns:
        Notes.
    """
    from diffusers import DDPMPipeline

    notes = []
    record = record | {"changes": ddpm.changes, "source_weights": ddpm.source.name}
    with _whole_folder(folder) as new:
        DDPMPipeline(ddpm.unet, ddpm.scheduler).save_pretrained(new)
        if data is not None:
            record["dataset"] = {"dataset": load_manifest(data)["name"]}
            atomic_save_array(new / DATA_MEAN_FILE, mean_image(data))
            loss = _validation_loss(ddpm, data, device)
            write_csv(new / "training.csv", [{"val_loss": loss}], ["epoch", "step", "train_loss", "val_loss"])
            _draw_grid(ddpm, new / "samples.png", device)
            notes.append(
                f"{folder}: mean squared error {loss:.3g} of the noise on validation images of {data} (near 1: it does "
                "not fit them); look at samples.png"
            )
        weights = new / "unet" / WEIGHTS[0]
        atomic_write_text(new / "training.json", json.dumps(record | {"sha256": sha256_file(weights)}, indent=2) + "\n")
    return notes


@torch.no_grad()
def _validation_loss(ddpm: ReleasedDDPM, data: Path, device: torch.device) -> float:
    """Mean squared error of eps on a few validation images, t spread over 1..T: near 1 for a model that does not fit
    the data or its schedule."""
    pipe = GuidedDDPMPipeline(ddpm.unet, ddpm.scheduler).to(device)
    schedule, predict_noise = pipe.schedule(), pipe.noise_predictor(torch.float32)
    images, _ = open_split(data, "val")
    count, losses = min(NUM_LOSS_IMAGES, len(images)), []
    for index in range(count):
        t = 1 + (schedule.num_steps - 1) * index // max(count - 1, 1)
        x0 = to_unit(images[index : index + 1]).to(device)
        noise = sample_noise(0, [index], t, x0.shape[1:], device)
        losses.append(float((predict_noise(schedule.q_sample(x0, t, noise), t).eps - noise).square().mean()))
    return sum(losses) / count


def _draw_grid(ddpm: ReleasedDDPM, path: Path, device: torch.device) -> None:
    """A few unguided samples in few steps: whether the model draws what it should is seen at a glance."""
    from nrcg.pipeline.progress import Progress

    pipe = GuidedDDPMPipeline(ddpm.unet, ddpm.scheduler).to(device).use_sampler("ddim")
    count = 16 if ddpm.unet.config.sample_size <= 64 else 4
    steps = min(NUM_GRID_STEPS, len(ddpm.scheduler.betas))
    with Progress("import-released samples.png", steps * count, "step") as bar:
        out = pipe(
            num_samples=count, batch_size=count, num_inference_steps=steps, start="standard_normal", on_step=bar.set
        )
    save_png(path, sample_grid(to_uint8(out.samples), math.isqrt(count)))


def _write_classifier(
    folder: Path,
    classifier: ReleasedClassifier,
    item: Item,
    names: list[str],
    image_size: int,
    data: Path | None,
    schedule: Schedule | None,
    record: dict,
    device: torch.device,
) -> list[str]:
    """The folder as `nrcg train-classifier` leaves it; with data also its accuracy. Returns notes."""
    channels = 3 if classifier.first_conv is None else classifier.first_conv["in_channels"]
    settings = {
        "architecture": "mobilenet_v3_small",
        "classes": names,
        "image_size": image_size,
        "channels": channels,
        "num_logits": classifier.num_logits,
        "batch_norm_momentum": 0.01,
    }
    if classifier.first_conv is not None:
        settings["first_conv"] = classifier.first_conv
    notes = []
    with _whole_folder(folder) as new:
        # Where the labels mean other classes there is no accuracy.
        if data is not None and load_manifest(data)["classes"] == names:
            images = ddpm.Images(*open_split(data, "val"), device)
            adapter = Classifier(classifier.module).to(device)
            accuracy = classifier.accuracy(adapter, images)
            settings["validation_accuracy"] = accuracy
            columns = ["epoch", "step", "train_loss", "val_accuracy", "learning_rate"]
            write_csv(new / "training.csv", [{"val_accuracy": accuracy}], columns)
            rows = classifier.accuracy_over_t(adapter, schedule, images)
            write_csv(new / "accuracy_over_t.csv", rows, ["t", "accuracy"])
            note = f"{folder}: {100 * accuracy:.1f} % of the validation images of {data} right"
            if item.role == "non_robust" and accuracy < 1.5 / len(names):
                note += ": near chance or below, so the order of its classes (--classes) or the data are others"
            notes.append(note)
        save_classifier(new, classifier.module, settings | record)
    return notes
