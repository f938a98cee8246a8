"""The report of an experiment."""

from __future__ import annotations

from pathlib import Path

from nrcg import tracking
from nrcg.config import ReportStep
from nrcg.provenance import git_commit, versions
from nrcg.report.page import write_report
from nrcg.report.studies import STUDIES


def make_report(
    settings: ReportStep,
    *,
    forward: Path,
    metrics: Path,
    samples: Path,
    figures: Path,
    models: Path,
    out: Path,
    reference: Path | None = None,
    comparison: Path | None = None,
) -> Path:
    """Write the self-contained HTML report, and track what it shows.

    Args:
        settings: The experiment's settings.
        forward: forward.csv.
        metrics: metrics.csv.
        samples: results/<experiment>/samples.
        figures: Folder of the figures.
        models: models/<experiment>.
        out: report.html. Beside it stand the studies that the settings ask for, in folders of their names.
        reference: reference.json; None leaves out how good the classifiers are.
        comparison: Table beside the paper's numbers; None writes none.

    Returns:
        `out`.
    """
    write_report(
        out,
        context={
            "experiment": settings.experiment,
            "description": settings.description,
            "target": settings.target,
            "classes": settings.classes,
            "T": settings.ddpm.schedule.num_train_timesteps,
            "num_samples": settings.sampling.num_samples,
            "start": settings.sampling.start,
            "dataset": settings.dataset.name,
            "source": settings.dataset.source,
            "commit": git_commit(),
            "versions": versions(),
            "settings": settings.model_dump(mode="json"),
        },
        forward_csv=forward,
        metrics_csv=metrics,
        figures_dir=figures,
        samples_dir=samples,
        models_dir=models,
        reference_json=reference,
        comparison_md=comparison,
        studies=[name for name in STUDIES if getattr(settings, name) is not None],
    )
    with tracking.run(settings.experiment, "report", kind="report", params=settings.model_dump(), deferred=True) as run:
        for path in (out, forward, metrics):
            run.log_artifact(path)
        for path in sorted(figures.glob("*.png")):
            run.log_artifact(path, "figures")
    return out
