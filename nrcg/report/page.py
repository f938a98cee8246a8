"""The report of an experiment: one HTML file with everything inside, to open, mail or print."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from nrcg.errors import DataError
from nrcg.files import atomic_write
from nrcg.report import comparison, paper, sections
from nrcg.report.best import best_rule, pareto_front
from nrcg.report.claims import check_claims
from nrcg.report.columns import frechet_columns, headline_protocol, read_forward, read_metrics
from nrcg.report.studies import STUDIES, Study
from nrcg.report.tables import edge_notes, tie_note


def write_report(
    out: str | os.PathLike,
    *,
    context: sections.ReportContext,
    forward_csv: str | os.PathLike,
    metrics_csv: str | os.PathLike,
    figures_dir: str | os.PathLike,
    samples_dir: str | os.PathLike,
    models_dir: str | os.PathLike,
    reference_json: str | os.PathLike | None = None,
    comparison_md: str | os.PathLike | None = None,
    studies: Sequence[str] = (),
) -> None:
    """Write the report as one HTML file that loads nothing from elsewhere.

    Figures, samples and the models' training records are left out where they are missing.

    Args:
        figures_dir: what `nrcg.report.figures.make_figures` wrote.
        samples_dir: holds METHOD/scaleSCALE/shardNNNN.npy.
        models_dir: the experiment's folder of models, with ddpm/ and classifiers/.
        reference_json: what `nrcg reference` wrote, for the classifiers' calibration; None leaves that out.
        comparison_md: where to write the table of published and measured values as Markdown; None writes none.
        studies: keys of `nrcg.report.studies.STUDIES`, whose folders stand beside the report.

    Raises:
        DataError: a CSV file is missing or broken, or the context lacks a name that is needed.
    """
    if lacks := [key for key in ("experiment", "target", "classes") if key not in context]:
        raise DataError(f"{out}: the report's context lacks {lacks[0]!r}")
    forward, metrics = read_forward(forward_csv), read_metrics(metrics_csv)
    claims = check_claims(forward, metrics, num_classes=len(context["classes"]), target=context["target"])
    chosen = sections.best_setup(metrics)
    strips, image_size = sections.method_strips(metrics, samples_dir)
    protocol = {"image_size": image_size, "num_steps": context.get("T")}
    protocol |= {name: context.get(name) for name in ("start", "source")}
    compared = comparison.compare(context["experiment"], metrics, **protocol)
    ours = {"features": headline_protocol(metrics), "num_samples": context.get("num_samples")}
    differences = paper.differences(context["experiment"], **ours, **protocol, settings=context.get("settings"))
    page = _template().render(
        context={"description": "", "commit": "", "versions": {}, **context},
        paper=paper,
        facts=sections.facts(context),
        summary=sections.summary(context, metrics, claims, chosen),
        claims=claims,
        tally=sections.count_claims(claims),
        distances=frechet_columns(metrics),
        comparison=sections.published_comparison(context["experiment"], metrics),
        published=paper.published_rows(context["experiment"]),
        differences=differences,
        notes=edge_notes(metrics),
        tie_note=tie_note(metrics),
        rule=best_rule(metrics),
        compared=[comparison.TITLES, *map(comparison.cells, compared)],
        front=list(map(sections.setup_name, pareto_front(metrics))),
        protocols=[str(metrics[0].get(key, "")) for key in ("protocols", "reference")],
        self_trained=ours["features"] == "judge",
        sweep=sections.sweep_table(metrics),
        figures=sections.shown_figures(Path(figures_dir)),
        strips=strips,
        gallery=sections.gallery(chosen, samples_dir),
        training=sections.training_record(Path(models_dir, "ddpm")),
        classifiers=sections.classifier_records(Path(models_dir, "classifiers"), context.get("T"), reference_json),
        settings=sections.flatten(context.get("settings", {})),
        betas=sections.betas(context),
        studies=[read(Path(out).parent / folder) for folder, read in map(STUDIES.__getitem__, studies)],
    )
    atomic_write(out, page.encode())
    if comparison_md is not None:
        atomic_write(comparison_md, comparison.markdown(context["experiment"], metrics, compared).encode())


def write_study_page(out: str | os.PathLike, title: str, studies: Sequence[Study]) -> None:
    """Write sections that belong to no experiment as one HTML file that loads nothing from elsewhere."""
    atomic_write(out, _template("study.html").render(title=title, studies=studies).encode())


def _template(name: str = "report.html") -> Template:
    """A page to fill; what is put into it is escaped."""
    environment = Environment(
        loader=PackageLoader("nrcg.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
