"""The picture of a trace: what the guidance did in each step."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nrcg.files import atomic_write
from nrcg.guidance.trace import Trace
from nrcg.report.figures import legend, render


def save_trace_figure(path: str | os.PathLike, trace: Trace) -> None:
    """Write `trace_figure` as PNG or SVG, as the path's ending says."""
    atomic_write(path, render(lambda: trace_figure(trace), Path(path).suffix.removeprefix(".")))


def trace_figure(trace: Trace) -> Figure:
    """What the guidance did in each step: norms, cosines, log-probability and clipped pixels, median over the samples
    and the range of the middle 80 %."""
    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    (norms, cosines), (log_prob, clipped) = figure.subplots(2, 2, sharex=True)
    gradient, guide = ("#0072B2", "gradient $g_t$"), ("#D55E00", "after the stabilizer")
    for axes, quantity in ((norms, "norm"), (cosines, "cosine")):
        _band(axes, trace.t, getattr(trace, f"grad_{quantity}"), *gradient)
        _band(axes, trace.t, getattr(trace, f"guide_{quantity}"), *guide)
    _band(log_prob, trace.t, trace.log_prob, "#009E73")
    _band(clipped, trace.t, 100 * trace.clipped, "#CC79A7")
    norms.set(ylabel="2-norm", yscale="log")
    cosines.set(ylabel="cosine with the step before", ylim=(-1.05, 1.05))
    log_prob.set(ylabel="log p(target)", xlabel="diffusion step $t$")
    log_prob.set_yscale("symlog", linthresh=1.0)
    log_prob.set_ylim(top=0.2)
    clipped.set(ylabel=r"pixels of $\hat{x}_0$ outside [-1, 1], %", xlabel="diffusion step $t$")
    if len(trace.t) > 1:
        log_prob.set_xlim(trace.t[0], trace.t[-1])  # as sampling goes, from T down
    legend(norms)
    return figure


def _band(axes: Axes, t: np.ndarray, values: np.ndarray, color: str, label: str | None = None) -> None:
    """Median over the samples (N, S) where there is one, and the range of the middle 80 %."""
    known = np.isfinite(values).any(axis=0)
    low, middle, high = np.nanpercentile(values[:, known], (10, 50, 90), axis=0)
    axes.fill_between(t[known], low, high, color=color, alpha=0.2, linewidth=0)
    axes.plot(t[known], middle, color=color, linewidth=1.7, label=label)
