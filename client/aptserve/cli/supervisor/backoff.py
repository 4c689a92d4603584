"""How soon a child that died is started again, and when no more."""

from __future__ import annotations

FIRST_DELAY_SECONDS = 0.5
MAX_DELAY_SECONDS = 10.0
MAX_FAST_FAILURES = 5
"""Deaths in a row, none of them after a healthy while, after which a restart is pointless."""
HEALTHY_SECONDS = 10.0
"""A child that has been ready for this long starts with a clean record when it dies."""


class Backoff:
    """Counts the failures in a row of one child."""

    def __init__(self) -> None:
        self.num_failures = 0

    def next_delay_seconds(self, ready_seconds: float | None) -> float | None:
        """Seconds until the next start, or ``None`` to give up.

        ``ready_seconds``: how long the child that just died was ready; ``None``: it never was.
        """
        if ready_seconds is not None and ready_seconds >= HEALTHY_SECONDS:
            self.num_failures = 0
        self.num_failures += 1
        if self.num_failures >= MAX_FAST_FAILURES:
            return None
        return float(min(FIRST_DELAY_SECONDS * 2 ** (self.num_failures - 1), MAX_DELAY_SECONDS))
