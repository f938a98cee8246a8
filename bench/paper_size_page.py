"""The outcome of paper_size.py so far as a page: results.md with its tables and figures, and the weights' card."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paper_size_run import BUDGETS, COMPARED, EXPERIMENT, ROLES, ROOT, TARGET, Run

SHARES = (0.20, 0.47)
"""Between these each of three classes' shares should lie among unguided samples."""
GOAL = 0.91
"""Judge accuracy of x0 + EMA 0.99; published, by the guide: 91.05 %."""
MOST_BYTES, MOST_FILE_BYTES = 50_000_000, 16_000_000
"""Of the weights, and of each of their files."""
CARD_MARK = "\n## Measured\n"


def write_page(run: Run, code: int) -> str:
    """Write results.md and what stands beside it, from the files that are there.

    Args:
        run: The run.
        code: Exit code of its stages: 0 done, 3 to be gone on with, another: failed.

    Returns:
        What is left to do, in words.
    """
    whole = run.state.get("whole", {})
    missing = ", ".join(stage for stage in BUDGETS if not whole.get(stage)) or "nothing"
    notes = [] if code in (0, 3) else [f"something failed (exit code {code})"]
    notes += [f"{name}: {reason}" for name, reason in run.state["failures"].items()]
    run.tables.mkdir(parents=True, exist_ok=True)
    tables = {"sweep": _collect(run, "sweep", "*@*.csv"), "best": _best_rows(run)}
    forward = _forward_rows(run)
    drawn = _guarded(lambda: _figures(run, tables["sweep"], forward))
    notes += [drawn] if isinstance(drawn, str) else drawn
    sections = [
        lambda: _facts(run),
        lambda: _model(run),
        lambda: _section(run, "Fig. 8: all methods", _about_sweep(run), tables["sweep"]),
        lambda: _table_two(run, tables["best"]),
        lambda: _forward_section(run, forward),
        lambda: _speed(run),
    ]
    title = f"# SportBalls, 64 x 64, at paper size{' (toy size: no result)' if run.toy else ''}"
    parts = [title, f"Left to do: {missing}." + "".join(f" Note: {note}." for note in notes)]
    parts += [_guarded(section) for section in sections]
    (run.out / "results.md").write_text("\n\n".join(filter(None, parts)) + "\n")
    how = "all steps" if tables["best"] else "half of the steps"
    _guarded(lambda: _extend_card(run, tables["best"] or tables["sweep"], how))
    return f"left: {missing}"


def _guarded(section: Callable[[], Any]) -> Any:
    """What a section says; where it fails, that it does: the rest is wanted all the same, at the end of a long run."""
    try:
        return section()
    except Exception as error:
        traceback.print_exc()
        return f"(A section is missing: {type(error).__name__}: {error})"


def _collect(run: Run, name: str, pattern: str) -> list[dict]:
    """tables/NAME.csv of the tables of single settings."""
    from nrcg.steps.collect import collect

    paths = sorted((run.work / "metrics" / name).glob(pattern))
    if not paths:
        return []
    return collect(paths, out=run.tables / f"{name}.csv", best_by="cfid", summary=None)


def _best_rows(run: Run) -> list[dict]:
    """Table 2's rows, of the largest number of samples that all methods have."""
    folder = run.work / "metrics" / "best"
    numbers = sorted({int(path.stem.partition("@")[2]) for path in folder.glob("*@*.csv")}, reverse=True)
    for number in numbers:
        if all((folder / f"{method}@{number}.csv").exists() for method in COMPARED):
            return _collect(run, "best", f"*@{number}.csv")
    return []


def _forward_rows(run: Run) -> list[dict]:
    from nrcg.report.columns import read_forward

    path = run.tables / "forward.csv"
    return read_forward(path) if path.exists() else []


def _figures(run: Run, rows: Sequence[dict], forward: Sequence[dict]) -> list[str]:
    """figures/*.png and *.svg; a note where they cannot be drawn."""
    if not rows or not forward:
        return [f"no figures before {'tables/forward.csv' if rows else 'the sweep'} is there"]
    try:
        from nrcg.steps.figures import draw_figures
    except ImportError as error:
        return [f"no figures: {str(error.name).split('.')[0]} is not installed"]
    samples = run.work / "samples" / "sweep"
    files = {"forward": run.tables / "forward.csv", "metrics": run.tables / "sweep.csv", "samples": samples}
    draw_figures(run.settings("report"), **files, out=run.out / "figures")
    return []


def _facts(run: Run) -> str:
    """The machine, the versions, the seeds, the minutes."""
    from nrcg.provenance import git_commit

    with contextlib.chdir(ROOT):
        commit = run.arguments.commit or git_commit()
    settings, sampling = run.settings("report"), run.settings("sample", COMPARED[0])
    classifiers = ", ".join(f"{role} {getattr(settings.classifiers, role).seed}" for role in ROLES)
    seeds = (
        f"data {settings.dataset.seed}, U-Net {settings.ddpm.seed}, {classifiers}, forward analysis"
        f" {settings.forward.seed}, samples {settings.sampling.seed}"
    )
    found = run.state.get("device", {})
    spent = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in run.state["spent"].items())
    facts = [
        ("device", f"{found.get('device', '?')}; {found.get('machine', '?')}"),
        ("commit", commit),
        ("versions", ", ".join(f"{name} {found[name]}" for name in found if name not in ("device", "machine"))),
        ("seeds", seeds),
        ("minutes", spent),
        ("sampling", f"U-Net's weights in {sampling.unet_weights or 'float32'}, precision {sampling.precision}"),
        ("start", settings.sampling.start),
        ("begun from", _origin(run) or "random weights"),
    ]
    return _table(["", ""], facts)


def _origin(run: Run) -> str:
    """The model that the weights began from, as it was named; empty: random weights."""
    return (run.state["asked"]["init"] or run.state["asked"]["pretrained"] or "").removeprefix("given/")


def _model(run: Run) -> str:
    """Training, classifiers, shares of the classes, size of the weights."""
    from nrcg.csv_files import read_csv

    lines = ["## Models"]
    if (run.ddpm / "training.csv").exists():
        last = read_csv(run.ddpm / "training.csv")[-1]
        epochs, images = run.state["plan"]
        trained = (
            f"{epochs} epochs of the first {images:,} training images, {last['images_per_second']:,.0f} images/s"
            f" ({run.state['images_per_second']:,.0f} alone)"
        )
        how = f"{_origin(run)} as it is" if run.arguments.pretrained else trained
        lines.append(f"U-Net: {how}; validation loss {last['val_loss']:.5f}.")
        weights = sorted((run.ddpm / "unet").glob("*.safetensors"))
        sizes = [path.stat().st_size for path in weights]
        fits = sum(sizes) <= MOST_BYTES and max(sizes) < MOST_FILE_BYTES
        lines.append(
            f"Weights: ddpm/, bfloat16, {len(sizes)} file(s), {sum(sizes):,} bytes, the largest {max(sizes):,}"
            f" (at most {MOST_BYTES:,} and below {MOST_FILE_BYTES:,}: {_yes(fits)})."
        )
    for role in ROLES:
        path = run.classifiers / role / "accuracy_over_t.csv"
        if path.exists():
            over_t = read_csv(path)
            at = ", ".join(
                f"{row['t']:.0f}: {100 * row['accuracy']:.0f} %" for row in over_t[:: max(len(over_t) // 5, 1)]
            )
            lines.append(f"Classifier {role}: accuracy at t = {at}.")
    for path in sorted(run.tables.glob("class_shares_*.csv"), key=lambda path: path.stat().st_mtime):
        rows = read_csv_of_shares(path)
        inside = all(SHARES[0] <= row["share"] <= SHARES[1] for row in rows)
        shares = ", ".join(f"{row['class']} {100 * row['share']:.1f} %" for row in rows)
        lines.append(
            f"Unguided samples, {rows[0]['num_samples']:.0f} in {rows[0]['steps']:.0f} steps, by the judge: {shares}"
            f" (each within {100 * SHARES[0]:.0f} to {100 * SHARES[1]:.0f} %: {_yes(inside)})."
        )
    return "\n\n".join(lines) if len(lines) > 1 else ""


def read_csv_of_shares(path: Path) -> list[dict[str, Any]]:
    """Rows of a class_shares_*.csv, numbers as floats."""
    import csv

    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: text if name == "class" else float(text) for name, text in row.items()} for row in rows]


def _about_sweep(run: Run) -> str:
    settings = run.settings("sample", COMPARED[-1], "sweep")
    return (
        f"{settings.sampling.num_samples} samples a setting, half of the {_num_steps(run)} steps; where the gradient"
        f" passes the U-Net it is not taken for a sample whose p({TARGET}) is above {settings.guidance.skip_above:g}"
        " (preset `fast`)."
    )


def _num_steps(run: Run) -> int:
    return run.settings("train_ddpm").ddpm.schedule.num_train_timesteps


def _section(run: Run, title: str, about: str, rows: Sequence[dict]) -> str:
    """Settings with their metrics, and the paper's claims about samples."""
    from nrcg.report.claims import check_claims

    if not rows:
        return f"## {title}\n\nNot measured yet."
    claims = check_claims([], rows, num_classes=len(run.settings("report").classes), target=TARGET)
    measured = [claim for claim in claims if claim.holds is not None]
    return "\n\n".join([f"## {title}", about, _settings_table(rows), _claims(measured)])


def _settings_table(rows: Sequence[dict]) -> str:
    """A line for each method and scale; 95 % intervals in brackets."""
    from nrcg.report.columns import frechet_columns, method_label, sort_methods
    from nrcg.report.tables import format_interval, format_number, format_percent

    everything, conditional = frechet_columns(rows)
    order = sort_methods(str(row["method"]) for row in rows)
    body = []
    for row in sorted(rows, key=lambda row: (order.index(row["method"]), row["scale"])):
        judged = format_interval(row, "accuracy_judge", percent=True)
        cells = [method_label(row["method"]), f"{row['scale']:g}"]
        cells += [f"{format_percent(row['accuracy_judge'])} ({judged})", format_percent(row["accuracy_guide"])]
        cells += [f"{format_number(row[name])} ({format_interval(row, name)})" for name in (conditional, everything)]
        body.append([*cells, f"{row['nonfinite']:.0f}", format_number(row["images_per_second"], 3)])
    head = ["method", "scale", "judge, % (95 %)", "guide, %", conditional, everything, "not finite", "images/s"]
    return _table(head, body)


def _table_two(run: Run, rows: Sequence[dict]) -> str:
    """Unconditional, robust and EMA 0.99 beside the published numbers."""
    from nrcg.report import paper
    from nrcg.report.columns import method_label
    from nrcg.report.tables import format_interval, format_percent

    title = "Table 2: the best scales, all steps"
    if not rows:
        return f"## {title}\n\nNot measured yet."
    about = f"{rows[0]['num_samples']:.0f} samples a method, all {_num_steps(run)} steps, a gradient at each."
    ours = next(row for row in rows if row["method"] == COMPARED[-1])
    reached = _yes(ours["accuracy_judge"] >= GOAL)
    accuracy = (
        f"Judge accuracy of x0 + EMA 0.99: {format_percent(ours['accuracy_judge'])} %"
        f" ({format_interval(ours, 'accuracy_judge', percent=True)}); at least {100 * GOAL:.0f} % wanted: {reached}."
    )
    published = [
        (method_label(row.method), f"{row.scale:g}", f"{row.accuracy:.2f}", f"{row.cfid:.2f}", f"{row.fid:.2f}")
        for row in paper.published_rows(EXPERIMENT)
    ]
    theirs = _table(["published", "scale", "guide, %", "cFID", "FID"], published)
    settings = run.settings("report")
    differences = paper.differences(
        EXPERIMENT,
        features="judge",
        num_samples=int(rows[0]["num_samples"]),
        num_reference=int(rows[0]["num_reference"]),
        image_size=settings.dataset.image_size,
        num_steps=_num_steps(run),
        start=settings.sampling.start,
        source="sportballs",
        settings=settings.model_dump(mode="json"),
    )
    return "\n\n".join(
        [_section(run, title, about, rows), accuracy, theirs, f"Not comparable in value: {'; '.join(differences)}."]
    )


def _forward_section(run: Run, rows: Sequence[dict]) -> str:
    from nrcg.report.claims import check_claims

    title = "## Figs. 1 to 4"
    if not rows:
        return f"{title}\n\nNot measured yet."
    claims = check_claims(rows, [], num_classes=len(run.settings("report").classes), target=TARGET)
    measured = [claim for claim in claims if claim.holds is not None]
    return f"{title}\n\n{rows[0]['num_images']:.0f} validation images, tables/forward.csv.\n\n{_claims(measured)}"


def _speed(run: Run) -> str:
    from paper_size_stages import speed_table

    table = speed_table(run)
    about = "`bench/gpu.py`, one measurement of each, its numbers in speed.json." if table else "Not measured yet."
    return f"## Speed\n\n{about}\n\n{table}".rstrip()


def _extend_card(run: Run, rows: Sequence[dict], how: str) -> None:
    """What the weights began from and what was measured with them, at the end of their card.

    Args:
        run: The run.
        rows: Settings with their metrics.
        how: The steps that they were drawn in.
    """
    card, origin = run.ddpm / "README.md", _origin(run)
    if not card.exists():
        return
    began = f"The training began from the weights of `{origin}`." if origin else ""
    if run.arguments.pretrained:
        began = f"These are the weights of `{origin}`, taken as they are."
    measured = ""
    if rows:
        about = f"{rows[0]['num_samples']:.0f} samples a setting, {how}, judged by a network that guides nothing."
        measured = f"{about}\n\n{_settings_table(rows)}"
    sections = [part for part in (began, measured) if part]
    if sections:
        text = card.read_text().partition(CARD_MARK)[0]
        card.write_text(text + CARD_MARK + "\n" + "\n\n".join(sections) + "\n")


def _claims(claims: Sequence[Any]) -> str:
    """The paper's claims as a list, each with its verdict."""
    verdicts = {True: "holds", False: "does not hold", None: "not measured"}
    return "\n".join(
        f"- **{verdicts[claim.holds]}** ({claim.source}): {claim.text} {claim.measured}" for claim in claims
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"
