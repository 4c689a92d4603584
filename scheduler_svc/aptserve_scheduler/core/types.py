"""Values that enter and leave the scheduler core.

Everything here is frozen and free of I/O, so the same core runs behind gRPC, in a simulator and in
property tests. Times are seconds on one monotonic clock that the caller owns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from itertools import repeat
from typing import NewType, TypeVar

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)
SequenceId = NewType("SequenceId", int)
"""Handle of a request on one worker; a request that comes back after preemption gets a new one."""
PlanId = NewType("PlanId", int)


class Tier(IntEnum):
    """Form of a request's cache; the numbers are those of ``aptserve.v1.CacheTier``."""

    KV = 1
    HIDDEN = 2
    KV8 = 3


class FinishReason(Enum):
    """Why a request ended without an error."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class TierSpec:
    """One tier of a worker's pool: a block of ``block_size`` tokens takes ``units_per_block``."""

    tier: Tier
    units_per_block: int
    exact: bool = True


@dataclass(frozen=True, slots=True)
class CostCoefficients:
    """Seconds of an iteration as a linear form; field by field ``aptserve.v1.Calibration``."""

    base_seconds: float
    seconds_per_token: float
    seconds_per_sequence: float
    seconds_per_attention_pair: float
    seconds_per_cached_token: dict[Tier, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker advertises when it attaches. ``tiers`` starts with KV."""

    worker_id: WorkerId
    num_units: int
    block_size: int
    tiers: tuple[TierSpec, ...]
    max_num_seqs: int
    max_num_batched_tokens: int
    cost: CostCoefficients


@dataclass(frozen=True, slots=True)
class Objectives:
    """Latency objectives of one request, in seconds."""

    ttft_seconds: float
    tbt_seconds: float


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """An accepted request.

    ``sampling`` is opaque to the core and handed back in :class:`NewSequence`. ``max_tokens``
    counts all output tokens, those of ``resume_token_ids`` included. ``tenant``, ``priority``
    (0 is normal, higher is more urgent) and ``expected_output_tokens`` (the caller's guess) are for
    policies, each of which says what it does with them.
    """

    request_id: RequestId
    prompt_token_ids: Sequence[int]
    max_tokens: int
    objectives: Objectives
    sampling: object = None
    resume_token_ids: Sequence[int] = ()
    tenant: str = ""
    priority: int = 0
    expected_output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence in full, for a worker that does not know it: prompt, then known output."""

    sequence_id: SequenceId
    request_id: RequestId
    token_ids: Sequence[int]
    num_prompt_tokens: int
    tier: Tier
    max_tokens: int
    sampling: object


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """A sequence's part of an iteration: tokens ``[num_computed_tokens, +num_new_tokens)``."""

    sequence_id: SequenceId
    request_id: RequestId
    tier: Tier
    num_computed_tokens: int
    num_new_tokens: int


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One iteration of one worker. Applied in the order release, promote, new, scheduled."""

    plan_id: PlanId
    worker_id: WorkerId
    release: tuple[SequenceId, ...]
    promote: tuple[SequenceId, ...]
    new: tuple[NewSequence, ...]
    scheduled: tuple[ScheduledSequence, ...]
    reason: str
    """Why the policy composed it so, for operators."""
    preempted: tuple[RequestId, ...]
    promoted: tuple[RequestId, ...]
    num_waiting: int
    num_used_units: int


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """New tokens of a sequence; ``finish_reason`` is set when the worker ended it."""

    sequence_id: SequenceId
    token_ids: Sequence[int]
    finish_reason: FinishReason | None = None
    logprobs: object = None


@dataclass(frozen=True, slots=True)
class SequenceFailure:
    """A sequence that the worker could not run."""

    sequence_id: SequenceId
    message: str


@dataclass(frozen=True, slots=True)
class StepResult:
    """A worker's answer to one plan, translated from ``aptserve.v1.StepResult``."""

    plan_id: PlanId
    outputs: tuple[SequenceOutput, ...]
    step_seconds: float
    gap_seconds: float = 0.0
    num_free_units: int | None = None
    skipped: tuple[SequenceId, ...] = ()
    failures: tuple[SequenceFailure, ...] = ()


@dataclass(frozen=True, slots=True)
class TokensAppended:
    """A request got tokens."""

    request_id: RequestId
    token_ids: Sequence[int]
    logprobs: object = None


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """Where the time of an ended request went, in seconds; ``None`` where it never happened."""

    queued_seconds: float
    ttft_seconds: float | None
    tbt_p99_seconds: float | None
    total_seconds: float
    longest_wait_seconds: float
    """Longest time without a token, from arrival to the first one or between two."""
    num_preemptions: int
    objectives_met: bool


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """A request ended; the last event of its life. ``error`` is set instead of ``reason``."""

    request_id: RequestId
    reason: FinishReason | None
    num_prompt_tokens: int
    num_output_tokens: int
    timing: RequestTiming
    error: str | None = None


Event = TokensAppended | RequestFinished


_Value = TypeVar("_Value")


def make_many(kind: type[_Value], num: int, **columns: Iterable[object]) -> tuple[_Value, ...]:
    """Instances of a frozen dataclass with slots, from one column for each of its fields.

    Its own constructor sets every field through Python code, which for a batch of hundreds is a
    large part of the whole decision time; the slots' setters, called from C, take a third of that.
    """
    values = list(map(object.__new__, repeat(kind, num)))
    for name, column in columns.items():
        deque(map(getattr(kind, name).__set__, values, column), maxlen=0)
    return tuple(values)
