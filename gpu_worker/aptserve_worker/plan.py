"""Values that cross the seam between a worker's session (gRPC) and its engine (device).

The session translates protobuf into these at the edge; an engine sees nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Protocol


class Tier(IntEnum):
    """Form of a sequence's cache; the numbers are those of ``aptserve.v1.CacheTier``."""

    KV = 1
    HIDDEN = 2
    KV8 = 3
    """Keys and values as 8-bit codes: the only tier that is not exact."""


class FinishReason(Enum):
    """Why the worker itself ended a sequence."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens of one sequence are chosen; ranges as in ``aptserve.v1.SamplingParams``.

    The scheduler has validated and completed them: ``max_tokens`` and ``seed`` are always set.
    """

    max_tokens: int
    seed: int
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    num_logprobs: int | None = None
    """None: no logprobs; 0: the chosen token's alone; n: also the n most likely tokens'."""
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence in full: prompt, then the output known so far."""

    sequence_id: int
    request_id: str
    token_ids: Sequence[int]
    num_prompt_tokens: int
    tier: Tier
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Compute tokens ``[num_computed_tokens, +num_new_tokens)``; sample if that is the last one."""

    sequence_id: int
    num_computed_tokens: int
    num_new_tokens: int


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One iteration. Applied in the order release, promote, new, scheduled."""

    plan_id: int
    release: Sequence[int] = ()
    promote: Sequence[int] = ()
    new: Sequence[NewSequence] = ()
    scheduled: Sequence[ScheduledSequence] = ()


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Logprobs at one output position: the chosen token, then the most likely, best first."""

    chosen: tuple[int, float]
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """New tokens of a sequence; ``finish_reason`` when the worker ended it with them."""

    sequence_id: int
    token_ids: Sequence[int]
    finish_reason: FinishReason | None = None
    logprobs: Sequence[Logprobs] = ()


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What an engine made of a plan."""

    outputs: Sequence[SequenceOutput]
    skipped: Sequence[int] = ()
    failures: Sequence[tuple[int, str]] = ()
    """(sequence id, message) of sequences that could not be run; the others are unaffected."""
    num_free_units: int = 0


@dataclass(frozen=True, slots=True)
class TierInfo:
    """One tier of the pool."""

    tier: Tier
    units_per_block: int
    seconds_per_cached_token: float
    exact: bool = True


@dataclass(frozen=True, slots=True)
class CalibrationInfo:
    """Coefficients of the iteration time; field by field ``aptserve.v1.Calibration``."""

    base_seconds: float
    seconds_per_token: float
    seconds_per_sequence: float
    seconds_per_attention_pair: float


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine serves and can do; becomes ``aptserve.v1.Register``."""

    model_name: str
    fingerprint: str
    architecture: str
    context_length: int
    vocab_size: int
    eos_token_ids: Sequence[int]
    tokenizer_json: bytes
    num_units: int
    block_size: int
    unit_bytes: int
    tiers: Sequence[TierInfo]
    calibration: CalibrationInfo
    max_num_seqs: int
    max_num_batched_tokens: int
    device: str


class PlanError(Exception):
    """A plan disagrees with what the engine holds: a fault of the peer or of this software."""


MAX_LAUNCHED = 2
"""Steps that an engine may have under way at once: one runs, the next one waits for it. More would
gain nothing, and what is launched already cannot spare a sequence that has ended."""


class Launched(Protocol):
    """A step that the device works on, or will."""

    def wait(self) -> None:
        """Return once the device has done it; from any thread. Raises what broke."""
        ...


class Engine(Protocol):
    """Owns a model and its memory. Called from one thread only.

    A plan is first launched, then collected. Its output is the same whether or not the next plan is
    launched in between: what a sequence would not have run, had its end been known, is skipped and
    leaves no trace.
    """

    @property
    def info(self) -> EngineInfo:
        """What to register; constant after construction."""
        ...

    @property
    def overlaps(self) -> bool:
        """Whether to launch a plan while the one before runs; constant after construction."""
        ...

    def launch(self, plan: BatchPlan) -> Launched:
        """Begin one iteration. Raises :class:`PlanError` for a wrong plan.

        At most ``MAX_LAUNCHED`` may be launched and not collected.
        """
        ...

    def collect(self) -> StepOutput:
        """Wait for the oldest launched iteration and return its tokens."""
        ...

    def release(self, sequence_ids: Sequence[int]) -> None:
        """Forget sequences; unknown ids are ignored. Launched iterations keep their outputs."""
        ...

    def reset(self) -> None:
        """Forget every sequence and every launched iteration: the stream to the scheduler was
        lost."""
        ...
