"""One request of a run, judged by the objectives it was sent with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What a request asked for and got. Durations are seconds."""

    request_id: str
    arrival_seconds: float
    """Since the start of the run."""
    num_prompt_tokens: int
    num_output_tokens: int
    """Produced."""
    ttft_seconds: float | None
    """From arrival to the first token; ``None``: it never came."""
    tbt_p99_seconds: float | None
    """Nearest-rank P99 of the times between tokens; ``None``: fewer than two tokens."""
    total_seconds: float
    """From arrival to the end."""
    longest_wait_seconds: float
    """Longest time without a token, from arrival to the first one or between two."""
    completed: bool
    """It got everything it asked for."""
    error: str | None
    ttft_objective_seconds: float
    tbt_objective_seconds: float
    num_preemptions: int
    tenant: str = ""

    @property
    def ttft_met(self) -> bool:
        """The first token came in time."""
        ttft = self.ttft_seconds
        return ttft is not None and ttft <= self.ttft_objective_seconds

    @property
    def tbt_met(self) -> bool:
        """The P99 of the times between tokens is within bounds; a single token has none."""
        p99 = self.tbt_p99_seconds
        return p99 is None or p99 <= self.tbt_objective_seconds

    @property
    def is_good(self) -> bool:
        """Complete, with output, and within both objectives; a failed or empty answer is not."""
        has_output = self.completed and self.num_output_tokens > 0
        return has_output and self.ttft_met and self.tbt_met
