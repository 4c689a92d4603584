"""Our policy: as many requests as possible within their objectives, and a bound for the others.

The setting is that of :mod:`~aptserve_scheduler.policies.apt`, but what counts is how many requests
will meet their objectives. A waiting request is *late* when it would miss an objective even if its
prompt ran at once and alone, a running one when it has missed; the others are *live*. Every
iteration is a mixed batch, put together in this order:

1. **The overdue** that have a right to memory; see the bound below.
2. **Go on.** Each running request gets its next token, those whose prompt is under way the next
   chunk of it. When the pool is too small for their growth, late ones lose their memory, the latest
   arrivals first, then live ones, those that can be paused before the others, each the costliest
   first. Cost of a request: the units it holds and half of those it will grow by, times the tokens
   it still has to come.
3. **Admit** live requests in order of the time by which they must start. Where the memory or the
   time that is due by then exceeds what there will be, the costliest requests before it are put off
   (:func:`~aptserve_scheduler.policies.deadlines.keep_most`). The memory is what is free, what late
   running requests hold and lose if need be, and a forecast of what the others will give back. Once
   all others are in, those put off may use what is free. Then, or when memory is too short now for
   all the others, those put off start by *pausing*; see below.
4. **The late** start, in order of arrival, when every live request is in that could be, with memory
   that the running requests will not grow into soon.

How caches and chunks come to their size:

* **Tier.** A cache starts in the tier with the fewest units per block when memory is short and the
  steps to come get slower by less than one more request in the batch is worth: ``extra seconds <
  seconds of a step / decodes in it``; or when keys and values could not hold it to its end. A
  hidden cache becomes keys and values when nobody waits, a share of the pool stays free, and the
  seconds saved until its end exceed those of computing a token anew for each cached one.
* **Chunk.** Prompts join while the iteration, by the tokens it computes, stays within a share of
  the smallest slack of those who decode and, while requests wait, of their smallest TTFT objective;
  two steps' time is always allowed. The last to get in gets a chunk of what time is left. Nobody
  joins by whose prompt another that starts in this iteration would become late.

Output lengths are the caller's guess where given, otherwise learned from the service's own history.

**Pausing.** The objective for the times between tokens is for their P99, so of every hundred one
may be as long as it likes. A live request that has such a time to spare (``miss_after_seconds`` is
infinite) can be paused: it loses its memory and waits like one that has not begun, its tokens so
far to be computed anew. This is done for a waiting live request that was put off and cannot wait
itself (``miss_after_seconds`` is finite). All memory it starts with must come from paused ones, the
costliest first; what is free stays free. Only those are paused for it who hold their share of the
pool for ``pause_gain`` times as long yet as computing their caches anew will hold up the whole of
it: long prompts near their end are not. Nobody is looked at for it while what is free and held by
the late is too small for the shortest waiting request. A pause ends when there is memory, among
the live with the latest of deadlines, or when the line below comes to it.

This makes use of how the objective is worded. Who is paused meets it, but sees the output stand
still: for seconds as a rule, under overload for as long as the bound allows. ``apt-slo:steady``
pauses nobody: it stops a running live request only when memory runs out or the line needs it.

**Bound.** A request is *overdue* when

* it is late and its age exceeds its TTFT objective by more than ``patience_seconds``, or
* ``miss_after_seconds`` is infinite, and the time since its last token exceeds its TTFT objective
  by more than ``patience_seconds``; so whoever was paused is, until it has its next token.

A worker's overdue, running there or waiting, form a line: higher priority first, then earlier
arrival. The head of the line is in every batch, with a token or at least 64 of its prompt where the
batch may have so many. Whoever else holds memory gives way for it, and it never does. Only memory
of requests whose end is in flight must be waited for; then there is no batch until they are gone.
So an overdue request waits at most for as many batches as those ahead of it have tokens to come and
chunks of prompts. Ahead of it can come whoever arrived earlier or has a higher priority: a stream
of higher priorities may hold it up for ever, but no later arrival of its own. Those who follow the
head have the same right while all of them together fit ``lane_share`` of the pool. In
``apt-slo:unbounded`` patience is infinite: nobody is ever overdue, the late and the paused may wait
for as long as others keep the memory.

Priorities order the late; of the live, each level halves what a request seems to cost. Tenants are
not told apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aptserve_scheduler.arrays import Bools, Floats, Ints, Tiers, all_of, any_of, indices
from aptserve_scheduler.core.types import Tier, TierSpec
from aptserve_scheduler.policies.base import (
    THIS_ITERATION,
    Arrival,
    BatchProblem,
    Decision,
    Horizon,
    Policy,
)
from aptserve_scheduler.policies.common import make_room_for_oldest
from aptserve_scheduler.policies.deadlines import first_fits, keep_most
from aptserve_scheduler.policies.mixed_batch import Chosen, MixedBatch
from aptserve_scheduler.policies.outlook import LONG_SECONDS, Outlook
from aptserve_scheduler.policies.overdue import InLine, overdue_at, overdue_line
from aptserve_scheduler.policies.prediction import OutputPredictor
from aptserve_scheduler.policies.room import Room
from aptserve_scheduler.policies.tier_rates import TierRates

# Plain numbers, with which numpy compares several times faster than with enumeration members.
_KV, _HIDDEN = int(Tier.KV), int(Tier.HIDDEN)
_MOST_LIVE = 256
"""Waiting requests that must start first, and no more, are planned for in an iteration."""
_SPARE_SHARE = 0.2
"""Share of the pool that promotions leave free."""


@dataclass(frozen=True, slots=True)
class AptSloConfig:
    """Settings of the policy; ValueError names a field out of range."""

    patience_seconds: float = 60.0
    """A late request this much older than its TTFT objective is overdue, and a paused one that has
    waited for so much longer. Infinite: nobody ever is, and waiting has no bound; the policy's name
    says so then."""
    lane_share: float = 0.01
    """Share of the pool for overdue requests; the first of them has its place in any case."""
    slack_share: float = 0.5
    """Share of the smallest slack in the batch that an iteration may take."""
    pauses: bool = True
    """Whether to use that a long time between tokens now and then costs no P99 objective. Without,
    as the policy's name then says, a request that runs is only stopped when memory runs out."""
    pause_gain: float = 3.0
    """How many times the memory that a pause frees, over the time it was still needed, must
    outweigh the whole pool over the time of computing the cache anew. Over 1, since who is paused
    comes back, and found by simulation: 1 lets long prompts be computed twice for nothing, 8 leaves
    short ones waiting."""
    iteration_share: float = 0.25
    """Longest iteration while requests wait, as a share of their smallest TTFT objective."""

    def __post_init__(self) -> None:
        if not self.patience_seconds >= 0:
            raise ValueError(f"patience_seconds must not be negative, not {self.patience_seconds}")
        if not self.pause_gain >= 0:
            raise ValueError(f"pause_gain must not be negative, not {self.pause_gain}")
        for name in ("lane_share", "slack_share", "iteration_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be over 0 and at most 1, not {getattr(self, name)}")


class AptSloPolicy(Policy):
    """Most objectives met, by deadline and cost; bounded waiting for those that missed theirs."""

    name = "apt-slo"
    needs_history = True

    def __init__(self, config: AptSloConfig | None = None) -> None:
        self.config = config or AptSloConfig()
        if np.isinf(self.config.patience_seconds):
            self.name = "apt-slo:unbounded"
        elif not self.config.pauses:
            self.name = "apt-slo:steady"
        self._history = OutputPredictor()
        self._latest: _Round | None = None
        self._rates: TierRates | None = None

    def usable_tiers(self, tiers: tuple[TierSpec, ...]) -> tuple[TierSpec, ...]:
        """All of them."""
        return tiers

    def decide(self, problem: BatchProblem) -> Decision | None:
        """One mixed batch."""
        self._latest = self._round(problem)
        return self._latest.decide()

    def horizon(self, problem: BatchProblem, decision: Decision) -> Horizon:
        """As long as all running decode and the shortest that waits lacks memory.

        None comes free while they grow and nobody becomes late. Until somebody becomes overdue,
        nobody else gets a right to it, and the head of the line stays where it is. When nobody
        waits, what keeps hidden caches from being promoted is that too little is free.
        """
        running, waiting, config = problem.running, problem.waiting, self.config
        made = self._latest
        if made is None or made.problem is not problem:
            made = self._round(problem)
        outlook = made.outlook
        if not len(decision.slots) == outlook.num_decodes == len(running):
            return THIS_ITERATION
        num_free = problem.num_free_units - int(outlook.growth.sum())
        if not len(waiting):
            is_short = num_free <= int(_SPARE_SHARE * problem.num_units)
            stay = is_short or (running.tiers == _KV).all()
            return Horizon() if stay else THIS_ITERATION
        # Of the late only the head is sure to keep its memory: who follows may lose the right to.
        may_lose = running.missed.copy()
        may_lose[[row for runs, row in made.line[:1] if runs]] = False
        num_reachable = num_free + int((running.num_units + outlook.growth)[may_lose].sum())
        if num_reachable >= outlook.least_first_units:
            return THIS_ITERATION
        until = overdue_at(problem, outlook, patience_seconds=config.patience_seconds)
        return Horizon(until=until, while_late_alike=True)

    def arrived(self, arrival: Arrival) -> None:
        """Note the size of its prompt."""
        self._history.arrived(arrival)

    def ended(self, slot: int, num_output_tokens: int, *, completed: bool) -> None:
        """Learn from its length."""
        self._history.ended(slot, num_output_tokens, completed=completed)

    def _round(self, problem: BatchProblem) -> _Round:
        self._rates = TierRates.of(problem, self._rates)
        return _Round(problem, self.config, Outlook(problem, self._rates, self._history))


class _Round:
    """One decision, in the order of the methods of :meth:`decide`."""

    def __init__(self, problem: BatchProblem, config: AptSloConfig, outlook: Outlook) -> None:
        self.problem, self.config, self.outlook = problem, config, outlook
        self.line = overdue_line(
            problem,
            outlook,
            patience_seconds=config.patience_seconds,
            lane_share=config.lane_share,
        )

    def decide(self) -> Decision | None:
        """The batch; see the head of this file."""
        problem, running, outlook = self.problem, self.problem.running, self.outlook
        config, line = self.config, self.line
        in_line = np.zeros(len(running), np.bool_)
        for runs, row in line:
            if runs:
                in_line[row] = True
        # Nothing here may refer to self: in a cycle, the arrays of a decision would outlive it
        # until collected, and the next ones would be made in memory that no cache holds.
        self.room = Room(
            problem,
            outlook.growth,
            late=running.missed,
            can_pause=np.isinf(running.miss_after_seconds) & config.pauses,
            protected=in_line,
            costs=lambda: outlook.costs,
            pays=lambda: outlook.pool_seconds > config.pause_gain * outlook.anew_seconds,
        )
        # Only beside requests whose end is in flight can the head of the line lack memory.
        if not self.room.fit_growth():
            return None
        self.batch = MixedBatch(problem, outlook, self._most_seconds())
        if line and not self._serve(line):
            return None
        self._go_on(among=~in_line)
        if len(problem.waiting) and self._may_start_some() and self._admit_live():
            self._admit_late()
        chosen = self.batch.chosen(self.room.gives_way)
        return self._decision(chosen) if chosen else make_room_for_oldest(problem)

    def _serve(self, line: list[InLine]) -> bool:
        """The line goes before everyone else; False: the memory for its head is in flight."""
        for place, (runs, row) in enumerate(line):
            if self.batch.is_full:
                break
            if not runs:
                num_units = int(self.outlook.first_units[row])
                if not self.room.take(num_units, from_late=True, from_live=True):
                    return False
                self.batch.start(row)
            elif self.outlook.decodes[row]:
                self.batch.decode(np.array([row]))
            else:
                self.batch.go_on(row, must=place == 0)
        return True

    def _most_seconds(self) -> float:
        """Time that the iteration should take at most."""
        problem, running, config = self.problem, self.problem.running, self.config
        counts = self.outlook.decodes & ~self.room.gives_way & ~running.missed
        slack = (running.miss_after_seconds - running.pending_seconds)[counts]
        most = config.slack_share * float(np.minimum.reduce(slack, initial=LONG_SECONDS))
        if len(problem.waiting):
            least_ttft = float(np.minimum.reduce(problem.waiting.ttft_seconds))
            most = min(most, config.iteration_share * least_ttft)
        return max(most, 2 * self.outlook.step_seconds)

    def _go_on(self, among: Bools) -> None:
        """Running requests: tokens, then chunks of prompts, the earliest arrival first."""
        among = among & self.problem.running.schedulable & ~self.room.gives_way
        decodes = among & self.outlook.decodes
        self.batch.decode(indices(decodes))
        for row in indices(among & ~decodes).tolist():
            self.batch.go_on(row, must=self.batch.is_empty)

    def _may_start_some(self) -> bool:
        """Whether there is a place for anybody at all, so that it is worth looking for whom."""
        room = self.room
        has_seat = room.num_seats > 0 or room.has_late
        has_memory = room.num_reachable >= self.outlook.least_first_units
        return has_seat and has_memory and not self.batch.is_full

    def _admit_live(self) -> bool:
        """Live ones in time, then those put off with what is free; False: nothing is left."""
        rows, deadlines = self._live_by_deadline()
        if not len(rows):
            return True
        if not self._may_start_one_of(rows):
            return False
        kept = self._kept(rows, deadlines)
        in_time, put_off = rows[kept], rows[~kept]
        fits = first_fits(self.outlook.first_units[in_time], self.room.num_reachable)
        for row in in_time[fits].tolist():
            if not self.batch.has_place_for(row):
                return False
            if self.room.take(int(self.outlook.first_units[row]), from_late=True):
                self.batch.start(row)
        if not all_of(fits):
            self._start_by_pausing(put_off)
            return False
        fits = first_fits(self.outlook.first_units[put_off], self.room.num_free)
        if not self._start_free(put_off[fits]):
            return False
        return self._start_by_pausing(put_off[~fits])

    def _may_start_one_of(self, rows: Ints) -> bool:
        """Whether there is memory for any of these, whoever of them is put off."""
        first_units = self.outlook.first_units[rows]
        if int(np.minimum.reduce(first_units)) <= self.room.num_reachable:
            return True
        cannot_wait = np.isfinite(self.problem.waiting.miss_after_seconds[rows])
        least = first_units[cannot_wait].min(initial=self.problem.num_units + 1)
        return self.room.num_by_pausing >= int(least)

    def _start_by_pausing(self, rows: Ints) -> bool:
        """Begin those who cannot wait in the place of others who can; False: nothing is left."""
        cannot_wait = np.isfinite(self.problem.waiting.miss_after_seconds[rows])
        for row in rows[cannot_wait].tolist():
            if not self.batch.has_place_for(row):
                return False
            if not self.room.take_by_pausing(int(self.outlook.first_units[row])):
                return False
            self.batch.start(row)
        return not len(rows)

    def _live_by_deadline(self) -> tuple[Ints, Floats]:
        """Live waiting requests, in order; seconds until they must start."""
        outlook = self.outlook
        is_left = ~outlook.waiting_is_late
        is_left[self.batch.started] = False
        rows = indices(is_left)
        deadlines = outlook.waiting_slack[rows] - outlook.waiting_prefill[rows]
        if len(rows) > _MOST_LIVE:
            first = np.argpartition(deadlines, _MOST_LIVE)[:_MOST_LIVE]
            rows, deadlines = rows[first], deadlines[first]
        order = deadlines.argsort(kind="stable")
        return rows[order], deadlines[order]

    def _kept(self, rows: Ints, deadlines: Floats) -> Bools:
        """[n] whom to serve in time."""
        problem, outlook, room = self.problem, self.outlook, self.room
        num_units = outlook.first_units[rows]
        # A prompt takes its time and its share of the decodes of the iterations it is spread over.
        per_token = outlook.step_seconds / problem.max_num_batched_tokens
        prefill = outlook.waiting_prefill[rows]
        seconds = prefill + per_token * problem.waiting.num_tokens[rows]
        time = outlook.waiting_slack[rows] - outlook.step_seconds
        is_enough = int(np.add.reduce(num_units)) <= room.num_free
        if is_enough and all_of(seconds.cumsum() <= time):
            return np.ones(len(rows), np.bool_)
        goes_on = problem.running.schedulable & ~problem.running.missed & ~room.gives_way
        memory = outlook.units_by(deadlines, room.num_reachable, goes_on)
        return keep_most(
            demands=(num_units.astype(np.float64), seconds),
            supplies=(memory, time),
            costs=(outlook.waiting_costs[rows], seconds * outlook.waiting_weights[rows]),
        )

    def _admit_late(self) -> None:
        """Late ones, in order, with free memory; as many as are not to give way again soon."""
        waiting, outlook, room = self.problem.waiting, self.outlook, self.room
        if room.num_seats < 1 or room.num_free < outlook.least_first_units:
            return
        is_left = outlook.waiting_is_late
        if self.batch.started:
            is_left = is_left.copy()
            is_left[self.batch.started] = False
        late = indices(is_left)
        late = late[(-waiting.priorities[late]).argsort(kind="stable")][: room.num_seats]
        if len(late) and outlook.first_units[late[0]] <= room.num_free:
            self._start_free(late, keep_free=outlook.soon_units)

    def _start_free(self, rows: Ints, *, keep_free: int = 0) -> bool:
        """Begin these in turn with memory that is free; False as soon as one cannot."""
        for row, num_units in zip(
            rows.tolist(), self.outlook.first_units[rows].tolist(), strict=True
        ):
            if not self.batch.has_place_for(row) or num_units > self.room.num_free - keep_free:
                return False
            if not self.room.take(num_units):
                return False
            self.batch.start(row)
        return True

    def _promoted(self, rows: Ints, num_tokens: Ints) -> Tiers:
        """[n] tiers of these running requests, hidden decodes in KV where it pays and fits.

        Computing a cached token anew takes longer than making keys and values of it does.
        """
        problem, running, outlook = self.problem, self.problem.running, self.outlook
        tiers = running.tiers[rows]
        spare = self.room.num_free - int(_SPARE_SHARE * problem.num_units)
        may = (tiers == _HIDDEN) & outlook.decodes[rows]
        if spare <= 0 or not any_of(may):
            return tiers
        kv = outlook.rates.kv.tier
        saved = outlook.rates.seconds_per_cached[tiers] - outlook.rates.seconds_per_cached[kv]
        may &= saved * outlook.tokens_to_come[rows] > problem.cost.seconds_per_token
        may &= problem.fits_pool(running, outlook.rates.kv)[rows]
        entries = indices(may)
        ends = running.num_computed_tokens[rows[entries]] + num_tokens[entries]
        in_kv = outlook.units_for(ends, np.full(len(entries), kv, np.int8))
        more = in_kv - outlook.units_for(ends, tiers[entries])
        fits = first_fits(more, spare)
        tiers[entries[fits]] = kv
        self.room.num_free -= int(more[fits].sum())
        return tiers

    def _decision(self, chosen: Chosen) -> Decision:
        running, waiting, started = self.problem.running, self.problem.waiting, chosen.started
        rows, num_tokens = chosen.running, chosen.running_tokens
        preempted = indices(self.room.gives_way)
        slots = running.slots[rows]
        tiers = running.tiers[rows] if len(waiting) else self._promoted(rows, num_tokens)
        if started:
            slots = np.concatenate([slots, waiting.slots[started]])
            num_tokens = np.concatenate([num_tokens, np.array(chosen.started_tokens, np.int64)])
            tiers = np.concatenate([tiers, np.array(chosen.started_tiers, np.int8)])
        num_too_late = np.count_nonzero(self.outlook.waiting_is_late)
        return Decision(
            slots=slots,
            num_tokens=num_tokens,
            tiers=tiers,
            preempted=running.slots[preempted],
            reason=(
                f"{len(rows)} go on, {len(started)} start "
                f"({len(started) - chosen.started_tiers.count(_KV)} not in KV), "
                f"{len(preempted)} give way "
                f"({np.count_nonzero(running.missed[preempted])} of them late); "
                f"{len(waiting) - len(started)} wait, {num_too_late} "
                f"waited too long to be in time; {int(np.add.reduce(num_tokens))} tokens in about "
                f"{self.batch.seconds:.3g} s, {self.room.num_free} units stay free"
            ),
        )
