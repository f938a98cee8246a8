"""Where data, models and results lie: every path of the workflow is spelled here and nowhere else.

Imports nothing of the package, so that the rules, the steps and the figures can all ask.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "val")

DDPM_FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "data_mean.npy",
    "training.json",
)
"""What a lost file of a diffusion model is missed for. Not its training.csv and samples.png, which are not worth a
training."""
CLASSIFIER_FILES = ("config.json", "model.safetensors", "accuracy_over_t.csv")
"""The same of a classifier."""

FIGURES = (
    "forward_accuracy",
    "logit_sensitivity",
    "gradient_sensitivity",
    "stabilizers",
    "accuracy_vs_scale",
    "fid_vs_scale",
    "cfid_vs_scale",
    "pareto",
    "best_samples",
)
"""Names of the figures of an experiment; nrcg.report draws each."""

LIKELIHOOD_FILES = ("likelihood.json", "likelihood.csv", "images.csv", "bits_per_dim.png", "bits_per_dim.svg")
"""What is made of the shards of a likelihood."""
OBJECTIVES_FILES = ("objectives.csv", "objectives.png", "objectives.svg", "samples.png")
"""What is made of the records of a grid of objectives."""

EXPLANATIONS_FILES = ("explanations.csv", "explanations.png", "explanations.svg", "pictures.png")
"""What is made of the measured explanations."""

REFERENCE_CACHE = ".nrcg/references"
"""Where features of reference images are kept; safe to delete."""


COMPILED = ".nrcg/compiled"
"""Where torch.compile keeps what it made; safe to delete."""


def format_scale(scale: float) -> str:
    """A guidance scale as it stands in paths and tables: 10 for 10.0, 0.5 for 0.5."""
    return f"{scale:g}" if float(f"{scale:g}") == scale else repr(scale)


@dataclass(frozen=True)
class DatasetPaths:
    """The files of a data set.

    Args:
        name: Name of the data set, its folder below data/.
        root: The workflow's folder.
    """

    name: str
    root: Path = Path()

    @property
    def folder(self) -> Path:
        return self.root / "data" / self.name

    @property
    def manifest(self) -> Path:
        return self.folder / "dataset.json"

    def array(self, split: str, name: str) -> Path:
        """An array of a split: `images`, `labels`, and of train `mean`."""
        return self.folder / split / f"{name}.npy"

    @property
    def arrays(self) -> list[Path]:
        """Every array."""
        images = [self.array(split, name) for split in SPLITS for name in ("images", "labels")]
        return [*images, self.array("train", "mean")]


@dataclass(frozen=True)
class ExperimentPaths:
    """The files of an experiment.

    Args:
        name: Name of the experiment, its folder below models/ and results/.
        root: The workflow's folder.
    """

    name: str
    root: Path = Path()

    @property
    def models(self) -> Path:
        return self.root / "models" / self.name

    @property
    def ddpm(self) -> Path:
        """The diffusers folder of the diffusion model."""
        return self.models / "ddpm"

    @property
    def classifiers(self) -> Path:
        return self.models / "classifiers"

    def classifier(self, role: str) -> Path:
        """The folder of the classifier of a role."""
        return self.classifiers / role

    @property
    def results(self) -> Path:
        return self.root / "results" / self.name

    @property
    def samples(self) -> Path:
        return self.results / "samples"

    def setting(self, method: str, scale: float) -> Path:
        """The folder of a method's samples at a scale."""
        return setting_folder(self.samples, method, scale)

    def shard(self, method: str, scale: float, number: int) -> Path:
        """The array of a shard; its record stands beside it (`record_of`)."""
        return self.setting(method, scale) / f"shard{number:04d}.npy"

    @property
    def forward(self) -> Path:
        return self.results / "forward.csv"

    @property
    def reference(self) -> Path:
        return self.results / "reference.json"

    def method_metrics(self, method: str) -> Path:
        return self.results / "metrics" / f"{method}.csv"

    @property
    def metrics(self) -> Path:
        return self.results / "metrics.csv"

    @property
    def summary(self) -> Path:
        return self.results / "summary.json"

    @property
    def figures(self) -> Path:
        return self.results / "figures"

    def figure(self, name: str, ending: str) -> Path:
        return self.figures / f"{name}.{ending}"

    @property
    def report(self) -> Path:
        return self.results / "report.html"

    @property
    def comparison(self) -> Path:
        return self.results / "paper_comparison.md"

    @property
    def likelihood(self) -> Path:
        """Bits per dimension: likelihood.csv, images.csv, likelihood.json, the figure, and the shards."""
        return self.results / "likelihood"

    def likelihood_shard(self, number: int) -> Path:
        return self.likelihood / f"shard{number:04d}.npz"

    def objective_ddpm(self, objective: str) -> Path:
        """The diffusers folder of an objective of the grid."""
        return self.models / "objectives" / objective

    @property
    def objectives(self) -> Path:
        """The grid of objectives: a record of each, objectives.csv, and the figures."""
        return self.results / "objectives"

    def objective(self, objective: str) -> Path:
        """The record of an objective; its samples and its numbers by t stand beside it."""
        return self.objectives / f"{objective}.json"

    @property
    def explanations(self) -> Path:
        """Explanations by method, a table of each, explanations.csv, and the figures."""
        return self.results / "explanations"

    def explanation_shard(self, explainer: str, number: int) -> Path:
        return self.explanations / explainer / f"shard{number:04d}.npz"

    def explainer_table(self, explainer: str) -> Path:
        """The metrics of a way to explain."""
        return self.explanations / f"{explainer}.csv"

    @property
    def tune(self) -> Path:
        """Where searches for a scale are kept; no rule makes it."""
        return self.results / "tune"


def setting_folder(samples: Path, method: str, scale: float) -> Path:
    """The folder of a method's samples at a scale, below a folder of samples."""
    return samples / method / f"scale{format_scale(scale)}"


def record_of(shard: Path) -> Path:
    """The record beside a shard's array."""
    return shard.with_suffix(".json")


def trace_of(shard: Path) -> Path:
    """The trace beside a shard's array, where one was recorded."""
    return shard.with_suffix(".trace.npz")
