"""Stop strings in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopScan:
    """Text that may go out now; ``matched`` is the stop string before which it ends for good."""

    text: str
    matched: str | None = None


class StopMatcher:
    """Finds the stop string that is complete first, wherever the pieces are cut.

    Text that may be the beginning of a stop string is held back. Of two that are complete at the
    same character the longer one counts, so less text goes out. What has gone out after any number
    of characters depends on those characters alone, never on the pieces.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stops = tuple(stop_strings)
        self._held = ""

    def push(self, piece: str) -> StopScan:
        """Take the next piece; not to be called again after a match."""
        if not self._stops:
            return StopScan(piece)
        text = self._held + piece
        hit = self._first_match(text)
        if hit is not None:
            start, stop = hit
            self._held = ""
            return StopScan(text[:start], stop)
        num_out = len(text) - self._num_to_hold(text)
        self._held = text[num_out:]
        return StopScan(text[:num_out])

    def flush(self) -> str:
        """Text still held back: the request ended in another way."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        best: tuple[int, int, str] | None = None  # end, start, stop string
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0:
                found = (start + len(stop), start, stop)
                best = found if best is None else min(best, found)
        return None if best is None else best[1:]

    def _num_to_hold(self, text: str) -> int:
        """Length of the longest ending of ``text`` that begins a stop string."""
        return max((_overlap(text, stop) for stop in self._stops), default=0)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of ``stop`` that ``text`` ends with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
