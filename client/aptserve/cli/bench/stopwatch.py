"""When the tokens of one request came, as its client sees it."""

from __future__ import annotations

import math


class Stopwatch:
    """Takes the times of one request's tokens, in seconds of a monotonic clock of the caller's."""

    def __init__(self, due: float) -> None:
        """``due``: when the request should be sent. What the client itself is late counts as
        waiting, or a slow client would make the service look fast.
        """
        self._due = due
        self._last_token = due
        self._gaps: list[float] = []
        self.ttft_seconds: float | None = None
        """From ``due`` to the first token; ``None``: it never came."""
        self.num_tokens = 0

    def on_tokens(self, count: int, now: float) -> None:
        """So many tokens came together: the first one ends a wait, the others had none."""
        if count < 1:
            return
        if self.ttft_seconds is None:
            self.ttft_seconds = now - self._due
        else:
            self._gaps.append(now - self._last_token)
        self._gaps.extend([0.0] * (count - 1))
        self._last_token = now
        self.num_tokens += count

    @property
    def tbt_p99_seconds(self) -> float | None:
        """Nearest-rank P99 of the times between tokens; ``None``: fewer than two tokens."""
        if not self._gaps:
            return None
        return sorted(self._gaps)[math.ceil(0.99 * len(self._gaps)) - 1]

    def total_seconds(self, now: float) -> float:
        """From ``due`` to now."""
        return now - self._due

    def longest_wait_seconds(self, now: float) -> float:
        """Longest time without a token, to the first one or between two; all of it without any."""
        if self.ttft_seconds is None:
            return self.total_seconds(now)
        return max([self.ttft_seconds, *self._gaps])
