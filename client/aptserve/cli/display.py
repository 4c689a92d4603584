"""What ``aptserve up`` shows: a live table on a terminal, one line per change elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from aptserve.cli.supervisor.parts import Part, State

_STYLES = {
    State.STARTING: "cyan",
    State.READY: "green",
    State.RESTARTING: "yellow",
    State.FAILED: "red",
}
_MARKS = {State.READY: "✓", State.RESTARTING: "!", State.FAILED: "✗"}


class Display:
    """Shows parts; ``live=False`` keeps to lines, as where log lines go to the same terminal."""

    def __init__(self, console: Console, *, live: bool) -> None:
        self._console = console
        self._live_wanted = live and console.is_terminal
        self._live: Live | None = None
        self._parts: Sequence[Part] = ()

    @contextlib.contextmanager
    def starting(self, parts: Sequence[Part]) -> Iterator[None]:
        """Show the parts as they come up, until the end of the block."""
        self._parts = parts
        if not self._live_wanted:
            yield
            return
        with Live(
            get_renderable=self._table, console=self._console, refresh_per_second=10
        ) as self._live:
            try:
                yield
            finally:
                self._live = None

    def on_change(self, part: Part) -> None:
        """Take note of a part's new state."""
        if self._live is None:
            style = _STYLES[part.state]
            self._console.print(
                f"[bold]{part.name}[/]: [{style}]{part.state.value}[/] {part.detail}".rstrip(),
                highlight=False,
            )

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for part in self._parts:
            style = _STYLES[part.state]
            if part.state is State.STARTING:
                mark: Spinner | Text = Spinner("dots", style=style)
            else:
                mark = Text(_MARKS[part.state], style)
            detail = part.detail or f"{part.seconds_in_state:.1f} s"
            table.add_row(mark, Text(part.name, "bold"), Text(part.state.value, style), detail)
        return table
