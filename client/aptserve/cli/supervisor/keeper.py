"""Keeps one child running."""

from __future__ import annotations

import asyncio
from typing import NoReturn

from aptserve.cli.supervisor.backoff import Backoff
from aptserve.cli.supervisor.child import Child, describe_exit
from aptserve.cli.supervisor.parts import Part, State

PERMANENT_EXIT_CODES = frozenset({2, 3})
"""A child says by these that the next start would fail as this one did: settings, model, peer."""

_NUM_LOG_LINES = 10


class ChildGaveUpError(Exception):
    """A child cannot be kept running; the message says why, with its last log lines."""


class Keeper:
    """Starts a child again, after a growing pause, whenever it dies."""

    def __init__(self, child: Child, part: Part) -> None:
        self.child = child
        self.part = part
        self._backoff = Backoff()
        self._was_ready = False

    async def run(self) -> NoReturn:
        """Keep the child running until cancelled, which leaves it running.

        Raises :class:`ChildGaveUpError`.
        """
        while True:
            self.part.become(State.STARTING)
            await self.child.start()
            exit_text = describe_exit(code := await self.child.wait())
            self._was_ready = self._was_ready or self.part.is_ready
            if code in PERMANENT_EXIT_CODES:
                raise self._give_up(f"cannot start ({exit_text})", num_lines=1)
            if code > 0 and not self._was_ready:  # it ended itself, and would do so again
                raise self._give_up(f"cannot start ({exit_text})", _NUM_LOG_LINES)
            delay = self._backoff.next_delay_seconds(self.part.ready_seconds)
            if delay is None:
                count = self._backoff.num_failures
                raise self._give_up(
                    f"died {count} times in a row, last by {exit_text}", _NUM_LOG_LINES
                )
            self.part.become(State.RESTARTING, f"died ({exit_text}), again in {delay:g} s")
            await asyncio.sleep(delay)

    def _give_up(self, what: str, num_lines: int) -> ChildGaveUpError:
        self.part.become(State.FAILED, what)
        lines = self.child.last_lines(num_lines)
        separator = ": " if num_lines == 1 else "\n  "
        return ChildGaveUpError(separator.join([f"{self.part.name} {what}", *lines]))
