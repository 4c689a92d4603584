"""Batches that wait until they are worth it: WAIT and Nested WAIT (arXiv 2504.11320).

Requests are of classes, by size of the prompt and, if the caller guessed it, of the output. Waiting
requests of a class are held back until as many of them wait as arrive during an iteration in
equilibrium (:mod:`~aptserve_scheduler.policies.flow`), and are then let go together. A class of
outputs of unknown length passes further gates, the nested segments: where an answer reaches 32,
128, 512 or 2048 tokens its request pauses, with its cache, until as many stand at that gate as are
to be expected there per iteration. Whoever has been let go takes part in every iteration.

Choices that the source leaves open, or that differ here:

* There, rates and lengths are given. Here rates are counted over the last ``window_seconds`` or so,
  and the share of answers that pass each gate is that of the completed ones.
* **Time-out**: a class is let go when the first of its requests has waited ``hold_share`` of its
  TTFT objective, or ``hold_seconds``; a gate opens when one has stood there for ``hold_share`` of
  its TBT objective, or as long.
* Nobody is held back or pauses while nothing else could run.
* Everyone of the class that waits when it is let go may start, not the threshold's number alone,
  and stays free to start until it ends. So does a request that lost its memory.
* Those let go start in arrival order. Batches are chunked ones
  (:mod:`~aptserve_scheduler.policies.chunked`) with the worker's own token limit: the source
  chooses thresholds so that memory lasts, here the latest arrivals lose theirs if it does not.
* Several workers seen within the window each expect an equal part of what arrives.

``wait:oracle`` takes ``expected_output_tokens`` for the truth, as a simulator fills it in: WAIT
itself. ``wait`` has it from those callers who state it; without any it is Nested WAIT. Priorities
and tenants are ignored, caches are KV only. Held back is nobody for longer than the time-out; after
that everybody waits for earlier arrivals alone, whose number is not bounded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from aptserve_scheduler.arrays import Bools, Floats, Ints, indices
from aptserve_scheduler.core.types import Tier, TierSpec
from aptserve_scheduler.policies.base import (
    THIS_ITERATION,
    Arrival,
    BatchProblem,
    Candidates,
    Decision,
    Horizon,
    Policy,
    decodes_all_running,
)
from aptserve_scheduler.policies.chunked import chunked_batch
from aptserve_scheduler.policies.flow import Flow, class_of, is_unknown
from aptserve_scheduler.policies.prediction import reaching

GATES = np.array([32, 128, 512, 2048], np.int64)
"""Output tokens after which a request of unknown length pauses."""


@dataclass(frozen=True, slots=True)
class WaitConfig:
    """Settings of the policy; ValueError names a field out of range."""

    is_oracle: bool = False
    """Whether ``expected_output_tokens`` is to be filled in by a simulator."""
    hold_share: float = 0.25
    """Share of its objective that a request is held back at most."""
    hold_seconds: float = 30.0
    """Time that a request is held back at most, whatever its objective."""
    window_seconds: float = 30.0
    """Time after which an arrival counts 1 / e of what it did."""
    window_answers: int = 1024
    """Completed answers after which one counts about 1 / e of what it did."""

    def __post_init__(self) -> None:
        if not 0 <= self.hold_share <= 1:
            raise ValueError(f"hold_share must be from 0 to 1, not {self.hold_share}")
        for name in ("hold_seconds", "window_seconds", "window_answers"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")


class WaitPolicy(Policy):
    """Classes start when enough of them wait; unknown lengths pause at gates; KV tier only."""

    needs_history = True

    def __init__(self, config: WaitConfig | None = None) -> None:
        self.config = config or WaitConfig()
        self.is_oracle = self.config.is_oracle
        self.name = "wait:oracle" if self.is_oracle else "wait"
        self._flow = Flow(self.config.window_seconds, self.config.window_answers, GATES)
        self._seen_at: dict[int, float] = {}
        """When each worker was last decided for."""
        # By slot.
        self._class = np.zeros(0, np.int64)
        self._let_go = np.zeros(0, np.bool_)

    def usable_tiers(self, tiers: tuple[TierSpec, ...]) -> tuple[TierSpec, ...]:
        """KV alone."""
        return tuple(tier for tier in tiers if tier.tier == Tier.KV)

    def decide(self, problem: BatchProblem) -> Decision | None:
        """A chunked batch of those who are neither held back nor pause."""
        for candidates in (problem.running, problem.waiting):
            if len(candidates):
                self._reach(int(candidates.slots.max()))
        joining, passing = self._thresholds(problem)
        free = self._let_classes_go(problem.waiting, joining)
        running = problem.running
        pauses = self._paused(running, passing)
        num_held, num_paused = len(problem.waiting) - len(free), int(np.count_nonzero(pauses))
        # To whoever composes the batch, a paused request is like one whose end is in flight.
        rest = replace(problem, running=running.with_schedulable(running.schedulable & ~pauses))
        budget = problem.max_num_batched_tokens
        decision = chunked_batch(rest, free, budget)
        if decision is None:
            num_held = num_paused = 0
            decision = chunked_batch(problem, np.arange(len(problem.waiting)), budget)
            if decision is None:
                return None
            self._let_go[problem.waiting.slots] = True
        return replace(
            decision, reason=f"{decision.reason}; {num_held} are held back, {num_paused} pause"
        )

    def horizon(self, problem: BatchProblem, decision: Decision) -> Horizon:
        """Without end when all running decode and nothing is left to be let go.

        That is, nobody is held back, and no gate that anyone will reach can make him pause.
        """
        is_held = not self._let_go[problem.waiting.slots].all()
        if is_held or not decodes_all_running(problem, decision):
            return THIS_ITERATION
        running = problem.running
        unknown = is_unknown(self._class[running.slots])
        _, passing = self._flow.thresholds(problem)  # those of the only worker, the highest
        last = GATES[passing > 1].max(initial=0)
        may_pause = unknown & (running.num_tokens - running.num_prompt_tokens <= last)
        return THIS_ITERATION if may_pause.any() else Horizon()

    def arrived(self, arrival: Arrival) -> None:
        """Count it, and hold it back."""
        self._reach(arrival.slot)
        num_output = max(arrival.expected_output_tokens or 0, 0)
        kind = int(class_of(np.array([arrival.num_prompt_tokens]), np.array([num_output]))[0])
        self._class[arrival.slot] = kind
        self._let_go[arrival.slot] = False
        self._flow.arrived(kind, arrival.num_prompt_tokens, num_output, arrival.now)

    def ended(self, slot: int, num_output_tokens: int, *, completed: bool) -> None:
        """Learn from its length."""
        if completed and is_unknown(self._class[slot : slot + 1])[0]:
            self._flow.completed(num_output_tokens)

    def _reach(self, slot: int) -> None:
        self._class = reaching(self._class, slot)
        self._let_go = reaching(self._let_go, slot)

    def _thresholds(self, problem: BatchProblem) -> tuple[Floats, Floats]:
        """Requests that must wait, by class; that must stand at each gate. For this worker."""
        since = problem.now - self.config.window_seconds
        self._seen_at[problem.worker] = problem.now
        self._seen_at = {worker: at for worker, at in self._seen_at.items() if at >= since}
        joining, passing = self._flow.thresholds(problem)
        return joining / len(self._seen_at), passing / len(self._seen_at)

    def _hold_seconds(self, objectives: Floats) -> Floats:
        seconds: Floats = np.minimum(self.config.hold_share * objectives, self.config.hold_seconds)
        return seconds

    def _let_classes_go(self, waiting: Candidates, joining: Floats) -> Ints:
        """Let go whom the rule lets go; rows of ``waiting`` that may start, in arrival order."""
        kinds, let_go = self._class[waiting.slots], self._let_go[waiting.slots]
        held = ~let_go
        num_held = np.bincount(kinds[held], minlength=len(joining))
        overdue = held & (waiting.pending_seconds >= self._hold_seconds(waiting.ttft_seconds))
        goes = num_held >= joining
        goes[kinds[overdue]] = True
        may_start: Bools = let_go | goes[kinds]
        self._let_go[waiting.slots] = may_start
        return indices(may_start)

    def _paused(self, running: Candidates, passing: Floats) -> Bools:
        """[n] running requests that stand at a gate which is not open."""
        num_output = running.num_tokens - running.num_prompt_tokens
        gate = np.minimum(np.searchsorted(GATES, num_output), len(GATES) - 1)
        stands = running.schedulable & (running.num_remaining_tokens == 1)
        stands &= (GATES[gate] == num_output) & is_unknown(self._class[running.slots])
        overdue = stands & (running.pending_seconds >= self._hold_seconds(running.tbt_seconds))
        is_open = np.bincount(gate[stands], minlength=len(GATES)) >= passing
        is_open[gate[overdue]] = True
        pauses: Bools = stands & ~is_open[gate]
        return pauses
