"""Attainment against rate: a line per policy, a panel per workload, system and burstiness."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from aptserve.evaluation.evaluation import Evaluation, Summary
from aptserve.evaluation.figures.panels import column_title, grid_of, row_title
from aptserve.evaluation.figures.style import INK, Look, legend_below

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase


def draw_attainment(figure: FigureBase, evaluation: Evaluation, look: Look) -> None:
    """Share of good requests by offered rate, with the 95 % interval as a band."""
    summaries = [summary for summary in evaluation.summaries() if summary.rate is not None]
    rows, columns = grid_of([summary.cell for summary in summaries])
    panels = figure.subplots(len(rows), len(columns), sharey=True, squeeze=False)
    targets = sorted({found.target for found in evaluation.goodputs})
    for row, row_axes in zip(rows, panels, strict=True):
        for column, axes in zip(columns, row_axes, strict=True):
            here = [s for s in summaries if row == _row(s) and column == s.cell.cv]
            _draw_panel(axes, here, look, targets)
            axes.set_title(column_title(column))
        row_axes[0].set_ylabel(f"{row_title(row, rows)}good requests (%)")
    for axes in panels[-1]:
        axes.set_xlabel("offered rate (requests/s)")
    legend_below(figure, panels.flat)


def _row(summary: Summary) -> tuple[str, str]:
    return summary.cell.workload, summary.cell.system


def _draw_panel(axes: Axes, summaries: list[Summary], look: Look, targets: list[float]) -> None:
    lines: dict[str, list[Summary]] = defaultdict(list)
    for summary in summaries:
        lines[summary.cell.policy].append(summary)
    for target in targets:
        axes.axhline(target * 100, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
    for policy, points in lines.items():
        rates = [point.rate for point in points if point.rate is not None]
        means = [point.attainment.mean * 100 for point in points]
        axes.plot(rates, means, label=policy, **look.line(policy))
        ranges = [point.attainment_range for point in points]
        axes.fill_between(
            rates,
            [low * 100 for low, _ in ranges],
            [high * 100 for _, high in ranges],
            color=look.colour(policy),
            alpha=0.15,
            linewidth=0,
        )
    axes.set_ylim(-2, 102)
    axes.set_xlim(left=0)
