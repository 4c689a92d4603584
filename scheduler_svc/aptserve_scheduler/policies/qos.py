"""Chunks by slack, prompts by deadline and work: the rule of QoServe (arXiv 2503.22562).

Every iteration decodes all running requests, one token each, and adds as many prompt tokens as the
slack of those decodes allows:

* **Chunk.** The slack of a request that decodes is its objective for the time between tokens less
  the time since its last one. The prompts get the tokens with which the iteration, by the cost
  model, still ends within the smallest slack. Whoever lost the objective for good, or would
  overstep it even without prompts, does not count.
* **Order.** The prompt with the smallest ``alpha * deadline + (1 - alpha) * work`` comes first;
  deadline: the time at which its next token is due; work: predicted seconds of computing what it
  has left. 1 is earliest deadline first, 0 shortest remaining prefill first.
* **Relegation.** Prompts that in this order would get their first token too late are relegated:
  they come after all others. At most ``relegated_share`` of the live requests are at a time, of
  the lowest priority first, then those that are too late already, then those with the most work.
  The share is 5 %, what the authors report; with ``qos:eager`` it has no limit, which serves more
  in time when far more arrives than can be served.

Choices that the source leaves open, or that differ here:

* There, a token is due at arrival + TTFT + n * TBT, so time gained earlier may be spent. Here the
  objective is on the time between tokens itself.
* ``alpha`` does not change with load: overload shows in what is relegated.
* A relegated request counts like the others again after ``relegated_seconds``.
* Prompts get ``least_tokens`` however small the slack, or decodes with tight objectives could keep
  them out for good.
* A prompt under way keeps its memory while another overtakes it. One starts when memory for all of
  it is free, less what those under way still need; the first that cannot start keeps out those
  after it. 1 % of the pool stays free while requests run. Memory too short for the decodes costs
  the latest arrivals theirs, and nobody new starts in that iteration.
* The speed at which the queue moves is foretold from the present decodes, memory aside.

Caches are KV only. A priority decides about relegation alone; tenants are ignored. Waiting is
bounded by order: with ``alpha`` over 0 no request is overtaken by one that arrives later than
``(1 - alpha) / alpha`` times its own work, plus what its TTFT objective exceeds that one's by, plus
``relegated_seconds``. The number of those before it is not bounded.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from aptserve_scheduler.policies.chunked import shares
from aptserve_scheduler.policies.common import make_room_for_oldest
from aptserve_scheduler.policies.fcfs import WATERMARK
from aptserve_scheduler.policies.prediction import reaching
from aptserve_scheduler.policies.slack import Pace, prompt_seconds

_NEVER = np.inf
_NO_ROWS = np.zeros(0, np.int64)
_NO_SECONDS = np.zeros(0, np.float64)
_NO_FLAGS = np.zeros(0, np.bool_)
_ROUNDING_SECONDS = 1e-6
"""Keys closer than this may change places when they are computed at another time."""


@dataclass(frozen=True, slots=True)
class QosConfig:
    """Settings of the policy; ValueError names a field out of range."""

    alpha: float = 0.5
    """Weight of the deadline against the work that is left."""
    least_tokens: int = 32
    """Prompt tokens of an iteration when there is no slack."""
    most_tokens: int = 2048
    """Most tokens of an iteration; a worker's own limit may be lower."""
    relegated_share: float = 0.05
    """Most of the live requests that are relegated at a time."""
    relegated_seconds: float = 60.0
    """How long a request stays relegated at most."""

    def __post_init__(self) -> None:
        for name in ("alpha", "relegated_share"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 to 1, not {value}")
        for name in ("least_tokens", "most_tokens"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not self.relegated_seconds > 0:
            raise ValueError(f"relegated_seconds must be positive, not {self.relegated_seconds}")


class QosPolicy(Policy):
    """Prompt tokens within the slack of decodes, most pressing prompts first; KV tier only."""

    needs_history = True

    def __init__(self, config: QosConfig | None = None, name: str = "qos") -> None:
        self.name = name
        self.config = config or QosConfig()
        self._relegated_at = np.zeros(0, np.float64)
        """By slot; infinite for those who never were."""

    def usable_tiers(self, tiers: tuple[TierSpec, ...]) -> tuple[TierSpec, ...]:
        """KV alone."""
        return tuple(tier for tier in tiers if tier.tier == Tier.KV)

    def decide(self, problem: BatchProblem) -> Decision | None:
        """All decodes, and prompts in their order as far as slack and memory reach."""
        running, waiting = problem.running, problem.waiting
        memory = _Memory.of(problem)
        pace = Pace.of(problem, memory.decodes)
        num_relegated = self._relegate(problem, pace)
        budget = min(self.config.most_tokens, problem.max_num_batched_tokens)
        decodes = memory.decodes[:budget]
        prompts = _Prompts.of(problem, memory, *self._line_up(problem, memory))
        chunks = prompts.num_remaining
        if len(chunks):
            by_slack = pace.num_tokens(problem.cost, prompts.num_computed, prompts.num_remaining)
            most = max(by_slack, self.config.least_tokens)
            chunks = prompts.chunks(min(budget - len(decodes), most), memory.num_free)
        chosen = chunks > 0
        num_tokens = np.concatenate([np.ones(len(decodes), np.int64), chunks[chosen]])
        if not len(num_tokens):
            return make_room_for_oldest(problem)
        return Decision(
            slots=np.concatenate([running.slots[decodes], prompts.slots[chosen]]),
            num_tokens=num_tokens,
            tiers=np.full(len(num_tokens), Tier.KV, np.int8),
            preempted=running.slots[memory.dropped],
            reason=(
                f"{len(decodes)} of {len(running)} running requests decode with "
                f"{pace.slack_seconds:.3g} s of slack beside {int(chunks.sum())} tokens of "
                f"{int(chosen.sum())} prompts; {len(waiting)} wait, {num_relegated} of them "
                f"relegated; {len(memory.dropped)} latest arrivals lose their memory"
            ),
        )

    def horizon(self, problem: BatchProblem, decision: Decision) -> Horizon:
        """As long as all running decode and the first in line lacks memory: it gets no more.

        All keys fall alike with time, so it stays the first until one of the relegated counts like
        the others again. Slack only matters to prompts.
        """
        waiting = problem.waiting
        if not decodes_all_running(problem, decision):
            return THIS_ITERATION
        if not len(waiting):
            return Horizon()
        is_relegated = self._is_relegated(waiting, problem.now)
        if self._num_more(problem, is_relegated) > 0 and self._may_be_relegated(waiting).any():
            return THIS_ITERATION
        if len(problem.running) < problem.max_num_seqs:
            keys = self._keys(problem, waiting)
            if not is_relegated.all():
                keys[is_relegated] = _NEVER
            may_be_first = keys <= keys.min() + _ROUNDING_SECONDS
            most_units = problem.num_free_units - int(WATERMARK * problem.num_units)
            if (_whole_units(problem, waiting.num_tokens[may_be_first]) <= most_units).any():
                return THIS_ITERATION
        ends = self._relegated_at[waiting.slots[is_relegated]] + self.config.relegated_seconds
        return Horizon(until=float(ends.min(initial=_NEVER)))

    def arrived(self, arrival: Arrival) -> None:
        """Nobody arrives relegated."""
        self._relegated_at = reaching(self._relegated_at, arrival.slot)
        self._relegated_at[arrival.slot] = _NEVER

    def _is_relegated(self, candidates: Candidates, now: float) -> Bools:
        at = self._relegated_at[candidates.slots]
        relegated: Bools = (at <= now) & (now < at + self.config.relegated_seconds)
        return relegated

    def _keys(self, problem: BatchProblem, candidates: Candidates) -> Floats:
        """[n] rank of each prompt, the smallest first; seconds, deadlines counted from now."""
        alpha, work = self.config.alpha, _work(problem, candidates)
        keys: Floats = alpha * _seconds_left(candidates) + (1 - alpha) * work
        return keys

    def _relegate(self, problem: BatchProblem, pace: Pace) -> int:
        """Relegate waiting requests as the rule says; returns how many are relegated now."""
        waiting = problem.waiting
        if not len(waiting):
            return 0
        self._relegated_at = reaching(self._relegated_at, int(waiting.slots.max()))
        is_relegated = self._is_relegated(waiting, problem.now)
        num_relegated = int(np.count_nonzero(is_relegated))
        num_more = self._num_more(problem, is_relegated)
        if num_more <= 0:
            return num_relegated
        work, left = _work(problem, waiting), _seconds_left(waiting)
        order = np.lexsort((self._keys(problem, waiting), is_relegated))
        most = min(self.config.most_tokens, problem.max_num_batched_tokens)
        stretch = pace.stretch(problem.cost, self.config.least_tokens, most)
        through_in = np.empty(len(order))
        through_in[order] = np.cumsum(work[order]) * stretch
        late = indices(self._may_be_relegated(waiting) & (through_in > left))
        worst = np.lexsort((-work[late], left[late] > 0, waiting.priorities[late]))[:num_more]
        self._relegated_at[waiting.slots[late[worst]]] = problem.now
        return num_relegated + len(worst)

    def _num_more(self, problem: BatchProblem, is_relegated: Bools) -> int:
        """How many more of the live may be relegated; ``is_relegated`` [n] over the waiting."""
        num_live = len(problem.waiting) + len(problem.running)
        most = int(self.config.relegated_share * num_live)
        return most - int(np.count_nonzero(is_relegated))

    def _may_be_relegated(self, waiting: Candidates) -> Bools:
        """[n] who lacks the first token and never was relegated."""
        never_was = np.isinf(self._relegated_at[waiting.slots])
        may_be: Bools = never_was & (waiting.num_output_tokens == 0)
        return may_be

    def _line_up(self, problem: BatchProblem, memory: _Memory) -> tuple[Ints, Ints]:
        """Rows of waiting prompts that start, and the order of those under way and of these."""
        running, waiting = problem.running, problem.waiting
        keys, late, starting = _NO_SECONDS, _NO_FLAGS, _NO_ROWS
        if memory.num_seats and len(waiting):
            units = _whole_units(problem, waiting.num_tokens)
            if int(units.min()) <= memory.num_unpromised:
                keys = self._keys(problem, waiting)
                late = self._is_relegated(waiting, problem.now)
                # The first in line that lacks memory keeps out those behind.
                in_line = np.lexsort((keys, late))[: memory.num_seats]
                ends = units[in_line].cumsum()
                starting = in_line[: int(ends.searchsorted(memory.num_unpromised, side="right"))]
        num_under_way = len(memory.under_way)
        if not num_under_way:
            return starting, np.arange(len(starting))
        of_running = self._keys(problem, running)[memory.under_way]
        keys = np.concatenate([of_running, keys[starting]])
        late = np.concatenate([np.zeros(num_under_way, np.bool_), late[starting]])
        return starting, np.lexsort((keys, late))


def _whole_units(problem: BatchProblem, num_tokens: Ints) -> Ints:
    """[n] units of whole prompts."""
    return problem.num_blocks(num_tokens) * problem.tiers[0].units_per_block


def _seconds_left(candidates: Candidates) -> Floats:
    """[n] time until the next token of each is due; negative when it is late."""
    has_token = candidates.num_output_tokens > 0
    objective = np.where(has_token, candidates.tbt_seconds, candidates.ttft_seconds)
    left: Floats = objective - candidates.pending_seconds
    return left


def _work(problem: BatchProblem, candidates: Candidates) -> Floats:
    return prompt_seconds(
        problem.cost, candidates.num_computed_tokens, candidates.num_remaining_tokens
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Memory:
    """What the running requests hold, and what that leaves for prompts."""

    decodes: Ints
    """Rows of ``running`` that decode."""
    under_way: Ints
    """Rows of ``running`` whose prompts are under way."""
    dropped: Ints
    """Rows of ``running`` that lose their memory."""
    num_free: int
    """Units that prompts may take in this iteration."""
    num_unpromised: int
    """Of those, the units that new prompts may take, whole."""
    num_seats: int
    """New requests that may hold memory."""

    @classmethod
    def of(cls, problem: BatchProblem) -> _Memory:
        running = problem.running
        is_decode = running.schedulable & (running.num_remaining_tokens == 1)
        after = problem.num_units_for(running.num_computed_tokens + is_decode, running.tiers)
        # Requests whose end is in flight keep their memory until the result frees it.
        ending = ~running.schedulable
        room = problem.num_units - int(running.num_units[ending].sum())
        after[ending] = 0
        num_kept = int(np.searchsorted(np.cumsum(after), room, side="right"))
        kept = np.arange(len(running)) < num_kept
        under_way = indices(kept & running.schedulable & ~is_decode)
        whole = problem.num_units_for(running.num_tokens[under_way], running.tiers[under_way])
        num_free = room - int(after[kept].sum())
        watermark = int(WATERMARK * problem.num_units) if len(running) else 0
        dropped = indices(~kept & running.schedulable)
        seats = 0 if len(dropped) else problem.max_num_seqs - len(running)
        return cls(
            decodes=indices(kept & is_decode),
            under_way=under_way,
            dropped=dropped,
            num_free=num_free,
            num_unpromised=num_free - int((whole - after[under_way]).sum()) - watermark,
            num_seats=max(0, seats),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Prompts:
    """Prompts in their order, of which each may go on or start; parallel arrays."""

    slots: Ints
    num_computed: Ints
    num_remaining: Ints
    num_units: Ints
    """Units held."""
    block_size: int
    units_per_block: int

    @classmethod
    def of(cls, problem: BatchProblem, memory: _Memory, starting: Ints, order: Ints) -> _Prompts:
        """Those of ``running`` under way and these rows of ``waiting``, in this order."""
        running, waiting = problem.running, problem.waiting

        def both(of_running: Ints, of_waiting: Ints) -> Ints:
            rows = np.concatenate([of_running[memory.under_way], of_waiting[starting]])
            return rows[order]

        return cls(
            slots=both(running.slots, waiting.slots),
            num_computed=both(running.num_computed_tokens, waiting.num_computed_tokens),
            num_remaining=both(running.num_remaining_tokens, waiting.num_remaining_tokens),
            num_units=both(running.num_units, waiting.num_units),
            block_size=problem.block_size,
            units_per_block=problem.tiers[0].units_per_block,
        )

    def chunks(self, num_tokens: int, num_units: int) -> Ints:
        """Tokens for each of so many, in turn, as long as the units last."""
        chunks = shares(self.num_remaining, num_tokens)
        num_blocks = -(-(self.num_computed + chunks) // self.block_size)
        growth = num_blocks * self.units_per_block - self.num_units
        chunks[np.cumsum(np.where(chunks > 0, growth, 0)) > num_units] = 0
        return chunks
