"""Both runs on one screen, live on a terminal; elsewhere a line now and then."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from aptserve.cli.demo import words
from aptserve.cli.demo.panel import run_panel
from aptserve.cli.demo.view import Phase, RunView
from aptserve.cli.values import format_seconds

_FRAMES_PER_SECOND = 5
_LINE_SECONDS = 4.0
"""Between two lines about a run where there is no terminal."""
_NARROW = 80
"""Columns under which the runs stand one below the other."""
_MAX_WIDTH = 120


class Screen:
    """Shows two runs and explains what happens."""

    def __init__(self, console: Console, views: tuple[RunView, RunView]) -> None:
        self._console = console
        self._views = views
        self._stage = ""
        self._notes: tuple[str, ...] = ()
        self._is_live = False
        self._next_line_seconds = 0.0

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Keep the screen up to date until the end of the block; it stays where it was."""
        if not self._console.is_terminal:
            self._say(words.TITLE)
            yield
            return
        with Live(
            get_renderable=self.render,
            console=self._console,
            refresh_per_second=_FRAMES_PER_SECOND,
        ):
            self._is_live = True
            try:
                yield
            finally:
                self._is_live = False

    def explain(self, stage: str) -> None:
        """Say what happens now."""
        self._stage = stage
        self._next_line_seconds = 0.0
        if stage:
            self._say(stage)

    def note(self, *notes: str) -> None:
        """Say what holds from now on."""
        self._notes = notes
        for note in notes:
            self._say(note)

    def on_status(self, view: RunView) -> None:
        """A run has news; a line of it is due from time to time."""
        due = view.elapsed_seconds >= self._next_line_seconds
        if not self._is_live and due and view.phase is Phase.RUNNING:
            self._next_line_seconds = view.elapsed_seconds + _LINE_SECONDS
            self._say(progress_line(view))

    def render(self) -> RenderableType:
        """The whole screen."""
        width = min(self._console.width, _MAX_WIDTH)
        longest_queue = max((max(v.waiting_history, default=0) for v in self._views), default=0)
        panels: RenderableType
        if width < _NARROW:
            panels = Group(*(run_panel(view, width, longest_queue) for view in self._views))
        else:
            table = Table.grid()
            table.add_row(*(run_panel(view, width // 2, longest_queue) for view in self._views))
            panels = table
        texts = [Text(note, "dim") for note in self._notes]
        body = Table.grid()
        body.add_column(width=width)
        for part in (Text(words.TITLE, "bold"), panels, Text(self._stage, "cyan"), *texts):
            body.add_row(part)
        return body

    def _say(self, text: str) -> None:
        if not self._is_live:
            self._console.print(text, soft_wrap=True)


def progress_line(view: RunView) -> str:
    """A run on one line."""
    line = f"{view.policy} after {format_seconds(view.elapsed_seconds)}: "
    line += f"{view.num_met} met and {view.num_missed} missed of {view.num_requests}"
    status = view.status
    if status is None:
        return line
    line += f"; {status.num_running} running, {status.num_waiting} waiting"
    for worker in status.workers:
        tiers = " and ".join(f"{t.num_used_units} {t.tier.value}" for t in worker.tiers)
        line += f"; memory: {tiers} of {worker.num_units} units"
    return line
