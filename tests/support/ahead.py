"""Plans made one step ahead of results, as the scheduler makes them, and two ways to run them."""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from aptserve_worker.plan import (
    MAX_LAUNCHED,
    BatchPlan,
    Engine,
    NewSequence,
    Sampling,
    ScheduledSequence,
    StepOutput,
    Tier,
)

from support.models import CONTEXT, VOCAB

Work = BatchPlan | tuple[int, ...]
"""A plan, or sequences to release between plans."""


def run_one_by_one(engine: Engine, work: Sequence[Work]) -> list[StepOutput]:
    """Each plan collected before the next one is launched."""
    outputs = []
    for item in work:
        if isinstance(item, BatchPlan):
            engine.launch(item)
            outputs.append(engine.collect())
        else:
            engine.release(item)
    return outputs


def run_ahead(engine: Engine, work: Sequence[Work]) -> list[StepOutput]:
    """Each plan launched before the one before it is collected."""
    outputs, num_launched = [], 0
    for item in work:
        if not isinstance(item, BatchPlan):
            engine.release(item)
            continue
        if num_launched == MAX_LAUNCHED:
            outputs.append(engine.collect())
            num_launched -= 1
        engine.launch(item)
        num_launched += 1
    return [*outputs, *(engine.collect() for _ in range(num_launched))]


def assert_same(outputs: Sequence[StepOutput], wanted: Sequence[StepOutput]) -> None:
    """Equal in everything, but for the last digits of logprobs: rows of other batches."""
    assert [_plain(o) for o in outputs] == [_plain(o) for o in wanted]
    found, expected = [_numbers(o) for o in outputs], [_numbers(o) for o in wanted]
    for some, others in zip(found, expected, strict=True):
        assert some == pytest.approx(others, abs=1e-4)


def _plain(output: StepOutput) -> StepOutput:
    return dataclasses.replace(
        output, outputs=[dataclasses.replace(o, logprobs=()) for o in output.outputs]
    )


def _numbers(output: StepOutput) -> list[float]:
    pairs = [
        pair
        for o in output.outputs
        for logprobs in o.logprobs
        for pair in (logprobs.chosen, *logprobs.top)
    ]
    return [number for _, number in pairs]


@dataclass
class _Planned:
    """A sequence as the planner knows it."""

    new: NewSequence
    tier: Tier
    num_tokens: int
    """Known ones, and one for each step under way that samples."""
    num_computed: int = 0
    num_under_way: int = 0
    tokens: list[int] = field(default_factory=list)
    has_ended: bool = False


class RandomPlanner:
    """Makes plans at random, before it knows the results of those under way.

    Chunks of prompts, decodes, promotions, releases of what runs and of what has ended, requests
    that come back, and now and then a sequence whose last token is under way.
    """

    def __init__(self, seed: int, tiers: Sequence[Tier], max_num_seqs: int) -> None:
        self._rng = random.Random(seed)
        self._tiers = tiers
        self._max_num_seqs = max_num_seqs
        self._sequences: dict[int, _Planned] = {}
        self._away: list[_Planned] = []
        """Released before their end; they come back once nothing of them is under way."""
        self._num_plans = self._num_ids = 0

    def next_work(self) -> Work:
        """A plan, now and then a release by itself."""
        if self._sequences and self._rng.random() < 0.05:
            return self._releases(1)
        release = self._releases(self._rng.choice((0, 0, 1, 2)))
        new = [self._add() for _ in range(self._rng.choice((0, 1, 2))) if self._has_room()]
        promote = [s.new.sequence_id for s in self._sequences.values() if self._may_promote(s)]
        for sequence_id in promote:
            self._sequences[sequence_id].tier = Tier.KV
        parts = [part for s in self._sequences.values() if (part := self._part(s)) is not None]
        self._rng.shuffle(parts)
        self._num_plans += 1
        return BatchPlan(self._num_plans, release, promote, [s.new for s in new], parts)

    def apply(self, plan: BatchPlan, output: StepOutput) -> None:
        """Take note of a result; results come in the order of plans."""
        everyone = {s.new.sequence_id: s for s in (*self._away, *self._sequences.values())}
        for part in plan.scheduled:
            if (sequence := everyone.get(part.sequence_id)) is not None:
                sequence.num_under_way -= 1
        for answer in output.outputs:
            if (sequence := everyone.get(answer.sequence_id)) is not None:
                sequence.tokens += answer.token_ids
                sequence.has_ended |= answer.finish_reason is not None
        for sequence_id, _ in output.failures:
            everyone[sequence_id].has_ended = True

    def _has_room(self) -> bool:
        return len(self._sequences) < self._max_num_seqs

    def _releases(self, count: int) -> tuple[int, ...]:
        """All that have ended and ``count`` others."""
        ended = [i for i, s in self._sequences.items() if s.has_ended]
        others = [i for i, s in self._sequences.items() if not s.has_ended]
        chosen = (*ended, *self._rng.sample(others, min(count, len(others))))
        for sequence_id in chosen:
            sequence = self._sequences.pop(sequence_id)
            if not sequence.has_ended:
                self._away.append(sequence)
        return chosen

    def _add(self) -> _Planned:
        self._num_ids += 1
        back = [s for s in self._away if not s.num_under_way]
        if back and self._rng.random() < 0.7:
            away = back[0]
            self._away.remove(away)
            new = away.new
            if not away.has_ended:
                new = dataclasses.replace(new, sequence_id=self._num_ids, token_ids=away.tokens)
                return self._begin(new)
        length = self._rng.choice((1, 2, 3, 4, 7, 12, 20, CONTEXT - 3))
        prompt = [self._rng.randrange(3, VOCAB) for _ in range(length)]
        tier = self._rng.choice(self._tiers)
        return self._begin(NewSequence(self._num_ids, "r", prompt, length, tier, self._sampling()))

    def _begin(self, new: NewSequence) -> _Planned:
        tokens = list(new.token_ids)
        sequence = _Planned(new, new.tier, len(tokens), tokens=tokens)
        self._sequences[new.sequence_id] = sequence
        return sequence

    def _may_promote(self, s: _Planned) -> bool:
        may = s.tier is Tier.HIDDEN and s.num_computed > 0 and not s.has_ended
        return may and self._rng.random() < 0.15

    def _part(self, s: _Planned) -> ScheduledSequence | None:
        left = s.num_tokens - s.num_computed
        limit = min(s.new.num_prompt_tokens + s.new.sampling.max_tokens, CONTEXT + 1)
        is_full = s.num_tokens >= limit
        if s.has_ended or self._rng.random() < 0.1 or (is_full and self._rng.random() < 0.9):
            return None
        count = left if self._rng.random() < 0.7 else self._rng.randint(1, left)
        part = ScheduledSequence(s.new.sequence_id, s.num_computed, count)
        s.num_under_way += 1
        if not is_full:
            s.num_computed += count
            s.num_tokens += count == left
        return part

    def _sampling(self) -> Sampling:
        rng = self._rng
        values: dict[str, Any] = {
            "max_tokens": rng.choice((1, 2, 5, 12)),
            "seed": rng.getrandbits(64),
            "stop_token_ids": frozenset(rng.sample(range(3, VOCAB), rng.choice((0, 12, 30)))),
            "ignore_eos": rng.random() < 0.5,
        }
        if rng.random() < 0.6:
            values |= {
                "temperature": rng.choice((0.0, 0.7, 1.3)),
                "top_k": rng.choice((0, 5)),
                "top_p": rng.choice((1.0, 0.9)),
                "min_tokens": rng.choice((0, 0, 3)),
                "num_logprobs": rng.choice((None, 0, 2)),
                "repetition_penalty": rng.choice((1.0, 1.3)),
                "frequency_penalty": rng.choice((0.0, 0.5)),
                "logit_bias": rng.choice(({}, {7: 2.0})),
            }
        return Sampling(**values)


def plan_and_run_ahead(
    engine: Engine, planner: RandomPlanner, num_steps: int
) -> tuple[list[Work], list[StepOutput]]:
    """What was asked of an engine that is always one step ahead of its results, and its answers."""
    work: list[Work] = []
    outputs: list[StepOutput] = []
    under_way: deque[BatchPlan] = deque()

    def collect() -> None:
        outputs.append(engine.collect())
        planner.apply(under_way.popleft(), outputs[-1])

    while len(outputs) + len(under_way) < num_steps:
        if len(under_way) == MAX_LAUNCHED:
            collect()
        item = planner.next_work()
        work.append(item)
        if isinstance(item, BatchPlan):
            engine.launch(item)
            under_way.append(item)
        else:
            engine.release(item)
    while under_way:
        collect()
    return work, outputs
