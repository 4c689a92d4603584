"""Measures, at start-up, what an iteration costs.

The scheduler's cost model is linear in what a batch contains (see ``aptserve.v1.Calibration``). A
few batches of different make-up are run through the engine itself, and the coefficients are the
non-negative least-squares solution over them, weighted so that short and long iterations count
alike.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from aptserve_worker.plan import (
    BatchPlan,
    CalibrationInfo,
    NewSequence,
    Sampling,
    ScheduledSequence,
    StepOutput,
    Tier,
)

_BUDGET_SECONDS = 1.5
"""No further batch is begun after this long."""

_REPEATS = 3

_WARM_UP_TOKENS = 5
"""Computed of a sequence: ``[0, 1)`` and ``[1, 3)`` are its prompt, 3 and 4 are decoded."""


class Runner(Protocol):
    """The part of an engine that calibration needs."""

    def execute(self, plan: BatchPlan) -> StepOutput: ...

    def release(self, sequence_ids: Sequence[int]) -> None: ...


@dataclass(frozen=True, slots=True)
class Shape:
    """Limits that calibration batches keep to."""

    tiers: Sequence[Tier]
    units_per_block: dict[Tier, int]
    num_units: int
    block_size: int
    context_length: int
    max_num_seqs: int
    max_num_batched_tokens: int

    def fits(self, tier: Tier, num_sequences: int, num_tokens: int) -> bool:
        """Whether so many sequences of so many tokens can be held and prefilled one by one."""
        blocks = -(-num_tokens // self.block_size) * num_sequences
        return (
            tier in self.units_per_block
            and num_sequences <= self.max_num_seqs
            and num_tokens <= min(self.context_length, self.max_num_batched_tokens)
            and blocks * self.units_per_block[tier] <= self.num_units
        )


@dataclass(frozen=True, slots=True)
class Measured:
    """Coefficients of the iteration time; the tiers' in seconds per cached token and step."""

    coefficients: CalibrationInfo
    seconds_per_cached_token: dict[Tier, float] = field(default_factory=dict)


UNCALIBRATED = Measured(CalibrationInfo(5e-3, 1e-4, 1e-4, 0.0))
"""A rough guess, for runs that skip the measurement; the scheduler learns better ones online."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """One timed iteration."""

    num_tokens: int
    num_sequences: int
    num_pairs: float
    cached: dict[Tier, int]
    seconds: float


def calibrate(engine: Runner, shape: Shape) -> Measured:
    """Run batches through ``engine`` for a couple of seconds; it holds no sequence afterwards."""
    samples: list[_Sample] = []
    ids = iter(range(1, 1 << 30))
    _warm_up(engine, shape, ids)
    deadline = time.perf_counter() + _BUDGET_SECONDS
    for num_sequences, context in _decode_cases():
        for tier in shape.tiers:
            if not shape.fits(tier, num_sequences, context + _REPEATS + 1):
                continue
            if samples and time.perf_counter() > deadline:
                break
            samples += _measure(engine, tier, num_sequences, context, ids)
    return _fit(samples, shape.tiers)


def _warm_up(engine: Runner, shape: Shape, ids: Iterator[int]) -> None:
    """A prompt in two pieces, a token decoded and sampled in each tier, and a promotion.

    First steps are not like others: a GPU compiles them, which may take longer than all the
    measuring is to take, and is not to happen in the middle of serving.
    """
    for tier in shape.tiers:
        if not shape.fits(tier, 1, _WARM_UP_TOKENS):
            continue
        sequence_id = next(ids)
        new = _new_sequence(sequence_id, tier, 3, temperature=1.0)
        for done, count in ((0, 1), (1, 2), (3, 1)):
            scheduled = [ScheduledSequence(sequence_id, done, count)]
            engine.execute(BatchPlan(0, new=[] if done else [new], scheduled=scheduled))
        if tier is Tier.HIDDEN and shape.fits(Tier.KV, 1, _WARM_UP_TOKENS):
            scheduled = [ScheduledSequence(sequence_id, 4, 1)]
            engine.execute(BatchPlan(0, promote=[sequence_id], scheduled=scheduled))
        engine.release([sequence_id])


def _decode_cases() -> Iterator[tuple[int, int]]:
    """(sequences, context): the cheap ones that separate the coefficients first."""
    yield from ((1, 8), (1, 256), (8, 8), (8, 128), (1, 768), (24, 32), (4, 512))


def _measure(
    engine: Runner, tier: Tier, num_sequences: int, context: int, ids: Iterator[int]
) -> Iterator[_Sample]:
    """Prefill sequences one by one, then decode them together; the fastest of a few counts."""
    members = []
    for _ in range(num_sequences):
        sequence_id, seconds = _prefill(engine, tier, context, ids)
        members.append(sequence_id)
        if len(members) <= _REPEATS:
            yield _Sample(context, 1, context * context / 2, {}, seconds)
    times = []
    for step in range(_REPEATS):
        scheduled = [ScheduledSequence(i, context + step, 1) for i in members]
        started = time.perf_counter()
        engine.execute(BatchPlan(0, scheduled=scheduled))
        times.append(time.perf_counter() - started)
    engine.release(members)
    cached = {tier: num_sequences * (context + _REPEATS // 2 + 1)}
    yield _Sample(num_sequences, num_sequences, 0.0, cached, min(times))


def _prefill(engine: Runner, tier: Tier, num_tokens: int, ids: Iterator[int]) -> tuple[int, float]:
    """A new sequence, and the seconds that its prompt took."""
    sequence_id = next(ids)
    new = _new_sequence(sequence_id, tier, num_tokens)
    plan = BatchPlan(0, new=[new], scheduled=[ScheduledSequence(sequence_id, 0, num_tokens)])
    started = time.perf_counter()
    engine.execute(plan)
    return sequence_id, time.perf_counter() - started


def _new_sequence(
    sequence_id: int, tier: Tier, num_tokens: int, temperature: float = 0.0
) -> NewSequence:
    sampling = Sampling(max_tokens=1 << 20, seed=0, temperature=temperature, ignore_eos=True)
    return NewSequence(sequence_id, "calibration", [1] * num_tokens, num_tokens, tier, sampling)


def _fit(samples: Sequence[_Sample], tiers: Sequence[Tier]) -> Measured:
    rows = [
        [1.0, s.num_tokens, s.num_sequences, s.num_pairs, *(s.cached.get(t, 0) for t in tiers)]
        for s in samples
    ]
    if not rows:
        return UNCALIBRATED
    seconds = np.array([s.seconds for s in samples])
    weights = 1.0 / seconds
    solution = _non_negative(np.array(rows) * weights[:, None], seconds * weights)
    base, per_token, per_sequence, per_pair = solution[:4].tolist()
    by_tier = dict(zip(tiers, solution[4:].tolist(), strict=True))
    return Measured(CalibrationInfo(base, per_token, per_sequence, per_pair), by_tier)


def _non_negative(
    matrix: npt.NDArray[np.float64], target: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Least squares with coefficients >= 0: drop the most negative one and solve again.

    Not the full active-set method, but with a handful of well separated columns it ends at the same
    solution or next to it, and the scheduler goes on learning from there.
    """
    scale = np.abs(matrix).max(axis=0)
    scale[scale == 0.0] = 1.0
    active = list(range(matrix.shape[1]))
    solution = np.zeros(matrix.shape[1])
    while active:
        found = np.linalg.lstsq((matrix / scale)[:, active], target, rcond=None)[0]
        worst = int(np.argmin(found))
        if found[worst] >= 0.0:
            solution[active] = found
            break
        del active[worst]
    result: npt.NDArray[np.float64] = solution / scale
    return result
