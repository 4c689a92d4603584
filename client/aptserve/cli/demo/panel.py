"""One run as a panel: queue, pool by tier, objectives."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from aptserve.cli.demo.view import Phase, RunView
from aptserve.cli.values import format_seconds
from aptserve.types import Tier

_LABEL_WIDTH = 10
_FRAME_WIDTH = 4
_MIN_BAR_WIDTH = 10
_STYLES = {Tier.KV: "green", Tier.HIDDEN: "blue", Tier.KV8: "yellow"}
_LEVELS = " ▁▂▃▄▅▆▇█"
_BORDERS = {Phase.RUNNING: "cyan", Phase.DONE: "white"}


def run_panel(view: RunView, width: int, longest_queue: int) -> Panel:
    """The run in ``width`` columns; ``longest_queue`` is the full height of the queue's curve."""
    bar_width = max(_MIN_BAR_WIDTH, width - _FRAME_WIDTH - _LABEL_WIDTH - 1)
    rows = Table.grid(padding=(0, 1, 0, 0))
    rows.add_column(width=_LABEL_WIDTH, style="bold", no_wrap=True)
    rows.add_column(width=bar_width, no_wrap=True)
    rows.add_row("requests", Text(_requests_text(view)))
    rows.add_row("objectives", _objectives_bar(view, bar_width))
    rows.add_row("", _objectives_text(view))
    rows.add_row("queue", Text(_queue_text(view), overflow="ellipsis"))
    rows.add_row("", Text(sparkline(view.waiting_history, longest_queue, bar_width), "yellow"))
    rows.add_row("memory", _memory_bar(view, bar_width))
    rows.add_row("on average" if view.phase is Phase.DONE else "", _memory_text(view))
    state = view.phase.value
    if view.phase in (Phase.RUNNING, Phase.DONE):
        state = f"{state}, {format_seconds(view.elapsed_seconds)}"
    return Panel(
        rows,
        title=f"[bold]{view.policy}[/] · {state}",
        title_align="left",
        border_style=_BORDERS.get(view.phase, "dim"),
        width=width,
    )


def sparkline(values: Sequence[int], highest: int, width: int) -> str:
    """A curve ``width`` characters wide at most; of values for one character the largest counts."""
    if not values:
        return ""
    num_columns = min(width, len(values))
    edges = [index * len(values) // num_columns for index in range(num_columns + 1)]
    top = max(highest, 1)
    return "".join(
        _LEVELS[-(-max(values[start:end]) * (len(_LEVELS) - 1) // top)]
        for start, end in pairwise(edges)
    )


def _memory_bar(view: RunView, width: int) -> Text:
    parts = [(_STYLES[tier], count) for tier, count in view.used_units.items()]
    return _bar(parts, view.num_units, width)


def _objectives_bar(view: RunView, width: int) -> Text:
    return _bar([("green", view.num_met), ("red", view.num_missed)], view.num_requests, width)


def _bar(parts: Sequence[tuple[str, int]], whole: int, width: int) -> Text:
    """Parts of a whole in their styles; edges are rounded, so that the bar keeps its length."""
    bar = Text()
    total = 0
    for style, count in parts:
        total += count
        bar.append("█" * (min(width, round(total / max(whole, 1) * width)) - len(bar)), style)
    bar.append("░" * (width - len(bar)), "dim")
    return bar


def _requests_text(view: RunView) -> str:
    if not view.num_requests:
        return ""
    ended = f"{view.num_met + view.num_missed} of {view.num_requests} ended"
    running = view.status.num_running if view.status is not None else 0
    return ended if view.phase is Phase.DONE else f"{running} run, {ended}"


def _objectives_text(view: RunView) -> Text:
    return Text.assemble(
        (f"{view.num_met} met", "green"), ", ", (f"{view.num_missed} missed", "red")
    )


def _queue_text(view: RunView) -> str:
    if view.phase is Phase.DONE:
        most = max(view.waiting_history, default=0)
        return f"{most} at most, one for {format_seconds(view.longest_wait_seconds)}"
    status = view.status
    if status is None:
        return ""
    if not status.num_waiting:
        return "nobody waits"
    return f"{status.num_waiting} wait, one for {format_seconds(status.oldest_wait_seconds)}"


def _memory_text(view: RunView) -> Text:
    if not view.num_units:
        return Text()
    tiers = [
        Text(f"{tier.value} {count}", _STYLES[tier]) for tier, count in view.used_units.items()
    ]
    return Text(", ").join(tiers).append(f" of {view.num_units}")
