"""Which files the workflow makes and reads: what the rules' input functions and targets ask for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nrcg.config import ROLES, Config, ExperimentConfig
from nrcg.layout import (
    CLASSIFIER_FILES,
    DDPM_FILES,
    EXPLANATIONS_FILES,
    FIGURES,
    LIKELIHOOD_FILES,
    OBJECTIVES_FILES,
    DatasetPaths,
    ExperimentPaths,
    format_scale,
    record_of,
)

SHOWN_SAMPLES = 256
"""First samples of a setting that figures and report show, as many as the paper's fig. 9."""


@dataclass(frozen=True)
class Targets:
    """The files of one experiment, as text, relative to the workflow's folder.

    Args:
        config: The whole configuration.
        experiment: Name of the experiment.
    """

    config: Config
    experiment: str

    @property
    def settings(self) -> ExperimentConfig:
        return self.config.experiments[self.experiment]

    @property
    def data(self) -> DatasetPaths:
        return DatasetPaths(self.settings.dataset.name)

    @property
    def paths(self) -> ExperimentPaths:
        return ExperimentPaths(self.experiment)

    def scale_texts(self, method: str) -> list[str]:
        """The guidance scales of a method's sweep, as they stand in paths."""
        return list(map(format_scale, self.settings.sweep[method]))

    def shards(self, method: str, most: int | None = None) -> list[str]:
        """The arrays of a method's shards, of each scale the first `most`; None: all."""
        count = self.settings.num_shards if most is None else min(most, self.settings.num_shards)
        return _texts(self.paths.shard(method, scale, n) for scale in self.settings.sweep[method] for n in range(count))

    def shards_and_records(self, method: str) -> list[str]:
        """The arrays of a method's shards, each with its record."""
        return [text for shard in self.shards(method) for text in (shard, record_of(Path(shard)).as_posix())]

    def shown_shards(self) -> list[str]:
        """The arrays whose first samples figures and report show."""
        most = -(-SHOWN_SAMPLES // self.settings.sampling.shard_size)
        return [shard for method in self.settings.sweep for shard in self.shards(method, most)]

    def samples(self) -> list[str]:
        """Every sample of the experiment."""
        return [text for method in self.settings.sweep for text in self.shards_and_records(method)]

    def method_metrics(self) -> list[str]:
        """The metrics of each method."""
        return _texts(map(self.paths.method_metrics, self.settings.sweep))

    def preview(self) -> list[str]:
        """The classifiers, of which one may be there to guide samples of the diffusion model in training."""
        return _texts(self.paths.classifier(role) for role in ROLES)

    def likelihood_shards(self) -> list[str]:
        """The arrays of the likelihood's shards; none where it is not measured."""
        config = self.settings.likelihood
        return _texts(self.paths.likelihood_shard(n) for n in range(config.num_shards if config is not None else 0))

    def likelihood_size(self, shard: int) -> int:
        """Images of a shard of the likelihood."""
        config = self.settings.likelihood
        return min(config.shard_size, config.num_images - shard * config.shard_size)

    def objective_records(self) -> list[str]:
        """The record of each objective of the grid; none where there is no grid."""
        config = self.settings.objectives
        return _texts(self.paths.objective(name) for name in (config.cells if config is not None else ()))

    def explanation_shards(self, explainer: str) -> list[str]:
        """The shards of a way to explain."""
        return _texts(self.paths.explanation_shard(explainer, n) for n in range(self.settings.explain.num_shards))

    def explainer_tables(self) -> list[str]:
        """The metrics of each way to explain; none where nothing is explained."""
        config = self.settings.explain
        return _texts(map(self.paths.explainer_table, config.methods if config is not None else ()))

    def all_explanations(self) -> list[str]:
        """Every shard of every way to explain."""
        config = self.settings.explain
        names = config.methods if config is not None else ()
        return [shard for name in names for shard in self.explanation_shards(name)]

    def studies(self) -> list[str]:
        """What the report shows beside the paper's comparison, where the experiment asks for it."""
        found = []
        if self.settings.likelihood is not None:
            found += [self.paths.likelihood / name for name in LIKELIHOOD_FILES]
        if self.settings.objectives is not None:
            found += [self.paths.objectives / name for name in OBJECTIVES_FILES]
        if self.settings.explain is not None:
            found += [self.paths.explanations / name for name in EXPLANATIONS_FILES]
        return _texts(found)

    def results(self) -> list[str]:
        """Every file that a job makes and another reads, and the end results.

        Snakemake does not miss an intermediate file while what was made of it earlier is there: without these, a lost
        one would not be made anew, and a job that failed in a rerun would leave the results of the run before as if
        they were up to date.
        """
        paths = self.paths
        models = [paths.ddpm / name for name in DDPM_FILES]
        models += [paths.classifier(role) / name for role in ROLES for name in CLASSIFIER_FILES]
        tables = [paths.forward, paths.reference, paths.metrics, paths.summary, paths.report, paths.comparison]
        figures = [paths.figure(name, ending) for name in FIGURES for ending in ("png", "svg")]
        files = [self.data.manifest, *self.data.arrays, *models, *tables, *figures]
        studies = [*self.likelihood_shards(), *self.objective_records(), *self.studies()]
        studies += [*self.all_explanations(), *self.explainer_tables()]
        # What stands beside a record or a table.
        studies += _texts(Path(one).with_suffix(end) for one in self.objective_records() for end in (".csv", ".npz"))
        studies += _texts(Path(one).with_suffix(".npz") for one in self.explainer_tables())
        return [*_texts(files), *self.method_metrics(), *self.samples(), *studies]

    def shard_size(self, shard: int) -> int:
        """Samples in a shard. The last one grows when an experiment asks for more samples."""
        sampling = self.settings.sampling
        return min(sampling.shard_size, sampling.num_samples - shard * sampling.shard_size)


def _texts(paths) -> list[str]:
    return [path.as_posix() for path in paths]
