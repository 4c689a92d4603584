"""Goodput bars: a bar per policy, a group per burstiness, a row per target and case."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aptserve.evaluation.evaluation import Evaluation
from aptserve.evaluation.figures.panels import column_title, grid_of, row_title
from aptserve.evaluation.figures.style import INK, Look, legend_below
from aptserve.evaluation.goodput import Bound, Goodput

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

_GROUP_WIDTH = 0.84
_MARKS = {Bound.FOUND: "", Bound.COARSE: "~", Bound.AT_LEAST: "≥", Bound.BELOW: "<"}


def draw_goodput(figure: FigureBase, evaluation: Evaluation, look: Look) -> None:
    """Highest rate that meets each target, with its 95 % interval as a whisker."""
    goodputs = evaluation.goodputs
    rows, groups = grid_of([found.cell for found in goodputs])
    targets = sorted({found.target for found in goodputs}, reverse=True)
    panels = figure.subplots(len(rows), len(targets), sharey="row", squeeze=False)
    for row, row_axes in zip(rows, panels, strict=True):
        for target, axes in zip(targets, row_axes, strict=True):
            here = [
                found
                for found in goodputs
                if (found.cell.workload, found.cell.system) == row and found.target == target
            ]
            _draw_panel(axes, here, groups, look)
            axes.set_title(f"{target:.0%} of requests good")
        row_axes[0].set_ylabel(f"{row_title(row, rows)}goodput (requests/s)")
        row_axes[0].set_ylim(bottom=0)  # for the row, whose scale is fixed from here on
    legend_below(figure, panels.flat)


def _draw_panel(
    axes: Axes, goodputs: list[Goodput], groups: list[float | None], look: Look
) -> None:
    policies = list(dict.fromkeys(found.cell.policy for found in goodputs))
    width = _GROUP_WIDTH / max(1, len(policies))
    size = max(5.0, min(8.0, 40 * width))
    for found in goodputs:
        place = policies.index(found.cell.policy) - (len(policies) - 1) / 2
        x = groups.index(found.cell.cv) + place * width
        half_width = found.half_width or 0.0
        axes.bar(
            x,
            found.rate,
            width * 0.92,
            **look.bar(found.cell.policy),
            label=found.cell.policy,
            yerr=[[min(half_width, found.rate)], [half_width]] if half_width else None,
            error_kw={"ecolor": INK, "elinewidth": 1.0, "capsize": 2},
        )
        text = f"{_MARKS[found.bound]}{found.rate:.3g}"
        top = (x, found.rate + half_width)
        axes.annotate(text, top, (0, 2), textcoords="offset points", ha="center", fontsize=size)
    axes.set_xticks(range(len(groups)), [column_title(cv) for cv in groups])
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.1)
