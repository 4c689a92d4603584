"""The pool by tier over time, and the queue under it: one column per run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aptserve.evaluation.figures.style import INK, OTHER_COLOUR, TIER_COLOURS, legend_below
from aptserve.evaluation.report import RunReport
from aptserve.evaluation.timeline import PoolTimeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase


def draw_timelines(figure: FigureBase, runs: list[RunReport]) -> None:
    """Runs that kept their timeline, side by side on equal axes."""
    kept = [(run, run.timeline) for run in runs if run.timeline is not None]
    panels = figure.subplots(
        2, len(kept), sharex=True, sharey="row", squeeze=False, height_ratios=[3, 2]
    )
    for column, (run, timeline) in enumerate(kept):
        pool, queue = panels[0][column], panels[1][column]
        _draw_pool(pool, timeline)
        _draw_queue(queue, timeline)
        pool.set_title(_title(run, [other for other, _ in kept]))
        queue.set_xlabel("time (s)")
    panels[0][0].set_ylabel("memory units used (%)")
    panels[1][0].set_ylabel("requests")
    panels[1][0].set_ylim(bottom=0)  # for the row, whose scale is fixed from here on
    legend_below(figure, [*panels[0][:1], *panels[1][:1]])


def _draw_pool(axes: Axes, timeline: PoolTimeline) -> None:
    units = max(1, timeline.num_units)
    tiers = list(timeline.used_units)
    axes.stackplot(
        timeline.seconds,
        *([100 * count / units for count in timeline.used_units[tier]] for tier in tiers),
        labels=[f"{tier} tier" for tier in tiers],
        colors=[TIER_COLOURS.get(tier, OTHER_COLOUR) for tier in tiers],
        linewidth=0,
    )
    axes.set_ylim(0, 100)
    axes.set_xlim(timeline.seconds[0], timeline.seconds[-1] or 1.0)


def _draw_queue(axes: Axes, timeline: PoolTimeline) -> None:
    axes.plot(timeline.seconds, timeline.num_waiting, color="#D55E00", label="waiting")
    axes.plot(timeline.seconds, timeline.num_running, color=INK, linestyle="--", label="running")


def _title(run: RunReport, runs: list[RunReport]) -> str:
    """Policy and rate, and whatever else differs between the columns."""
    parts = [run.cell.policy]
    if len({(other.cell.workload, other.cell.system) for other in runs}) > 1:
        parts = [run.cell.workload, run.cell.system, *parts]
    cv = "" if run.cell.cv is None else f", CV {run.cell.cv:g}"
    rate = run.offered_rate if run.rate is None else run.rate
    came = "all at once" if rate is None else f"{rate:.3g} requests/s"
    parts.append(f"{came}{cv}: {run.attainment:.0%} good")
    return "\n".join(parts)
