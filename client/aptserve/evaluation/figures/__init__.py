"""Figures of an evaluation as PNG. Needs matplotlib, which is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aptserve.evaluation.evaluation import Evaluation
from aptserve.evaluation.figures.attainment import draw_attainment
from aptserve.evaluation.figures.goodput import draw_goodput
from aptserve.evaluation.figures.panels import grid_of, title_of
from aptserve.evaluation.figures.style import Look, render
from aptserve.evaluation.figures.timeline import draw_timelines

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

__all__ = ["NamedFigure", "figures_of", "one_figure"]

_MARGIN_INCHES = 0.9
MAX_TIMELINES = 6
"""Columns of timelines in one figure; more would be too narrow to read."""


@dataclass(frozen=True, slots=True)
class NamedFigure:
    """A figure that has not been drawn yet. Width and height are inches."""

    title: str
    width: float
    height: float
    draw: Callable[[FigureBase], None]

    def png(self) -> bytes:
        """The picture."""
        return one_figure([self])


def figures_of(evaluation: Evaluation) -> list[NamedFigure]:
    """The figures that the data suffice for, the most telling one first."""
    cells = evaluation.cells()
    look = Look(cell.policy for cell in cells)
    found: list[NamedFigure] = []
    if len({run.rate for run in evaluation.runs} - {None}) > 1:
        found.append(_attainment(evaluation, look))
    if evaluation.goodputs:
        found.append(_goodput(evaluation, look))
    kept = [run for run in evaluation.runs if run.timeline is not None][:MAX_TIMELINES]
    if kept:
        width = max(5.0, 1.0 + 3.2 * len(kept))
        title = title_of("Memory pool by tier, and the queue", (run.cell for run in kept))
        found.append(NamedFigure(title, width, 5.2, lambda figure: draw_timelines(figure, kept)))
    return found


def one_figure(figures: list[NamedFigure]) -> bytes:
    """One PNG of the figures, below each other, with their titles. ValueError without any."""
    if not figures:
        raise ValueError("figures: at least one is needed")
    heights = [figure.height + 0.4 for figure in figures]

    def draw(whole: FigureBase) -> None:
        parts = whole.subfigures(len(figures), 1, squeeze=False, height_ratios=heights)
        for part, figure in zip(parts[:, 0], figures, strict=True):
            figure.draw(part)
            part.suptitle(figure.title, fontsize=11, fontweight="bold")

    return render(max(figure.width for figure in figures), sum(heights), draw)


def _attainment(evaluation: Evaluation, look: Look) -> NamedFigure:
    rows, columns = grid_of([run.cell for run in evaluation.runs])
    return NamedFigure(
        title_of("Requests within both objectives", evaluation.cells()),
        max(6.0, 1.0 + 3.4 * len(columns)),
        _MARGIN_INCHES + 2.7 * len(rows),
        lambda figure: draw_attainment(figure, evaluation, look),
    )


def _goodput(evaluation: Evaluation, look: Look) -> NamedFigure:
    rows, groups = grid_of([found.cell for found in evaluation.goodputs])
    num_policies = len({found.cell.policy for found in evaluation.goodputs})
    num_targets = len({found.target for found in evaluation.goodputs})
    panel_width = max(2.8, 0.4 * num_policies * len(groups))
    return NamedFigure(
        title_of("Goodput", evaluation.cells()),
        max(6.0, 1.0 + panel_width * num_targets),
        _MARGIN_INCHES + 2.7 * len(rows),
        lambda figure: draw_goodput(figure, evaluation, look),
    )
