"""What the SDK takes and returns: frozen values, durations as float seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from aptserve.errors import InvalidArgumentError


class FinishReason(Enum):
    """Why a request ended without an error."""

    STOP = "stop"
    """End-of-sequence token, stop token or stop string."""
    LENGTH = "length"
    """``max_tokens`` was reached, or the model's context is full."""
    ABORT = "abort"
    """Ended through ``abort``."""


class Tier(Enum):
    """The form in which a request's attention cache is held."""

    KV = "kv"
    """Keys and values."""
    HIDDEN = "hidden"
    """Layer-input hidden states, from which keys and values follow."""
    KV8 = "kv8"
    """Keys and values as 8-bit codes; the only tier whose outputs are not exact."""


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a request is to be judged by; ``None`` is the service's default."""

    ttft_seconds: float | None = None
    """Time to first token, from the arrival of the request."""
    tbt_seconds: float | None = None
    """P99 of the times between tokens."""

    def validate(self) -> None:
        """Raise :class:`InvalidArgumentError` naming the first field that is out of range."""
        for name, value in (("ttft", self.ttft_seconds), ("tbt", self.tbt_seconds)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InvalidArgumentError(f"objectives.{name}", "must be more than 0")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithm of a token's probability, after penalties and bias, before filters."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """Logprobs at one output position: the chosen token, then the most likely, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer.

    ``text`` holds whole characters only and so may lag behind ``token_ids``; ``logprobs`` has one
    entry per token where they were asked for, else none.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts; ``num_output_tokens`` includes resumed tokens."""

    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time went, by the service's clock; of the last part where a stream was resumed."""

    queued_seconds: float
    """From arrival until a batch first took the request."""
    time_to_first_token_seconds: float | None
    """From arrival to the first token; ``None`` without one."""
    time_between_tokens_p99_seconds: float | None
    """``None`` with fewer than two tokens."""
    total_seconds: float
    """From arrival to the end."""
    num_preemptions: int
    """Times the request lost its memory and was computed again."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer; what the caller gave as ``resume_token_ids`` is not repeated in it."""

    request_id: str
    model: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]
    finish_reason: FinishReason
    matched_stop_string: str | None
    """The stop string that ended the request, if one did."""
    matched_stop_token_id: int | None
    """The end-of-sequence or stop token that ended the request, if one did."""
    usage: Usage
    timing: Timing


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The served model."""

    name: str
    architecture: str
    context_length: int
    """Most tokens, prompt and output together."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    has_tokenizer: bool
    """Whether text prompts are possible."""
    tiers: tuple[Tier, ...]
    """Cache tiers that the attached workers offer."""


@dataclass(frozen=True, slots=True)
class TokenCount:
    """Tokens of a text, special tokens included as a prompt would have them."""

    num_tokens: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TierStatus:
    """Use of one tier on one worker."""

    tier: Tier
    units_per_block: int
    num_used_units: int
    num_sequences: int
    seconds_per_cached_token: float
    """Current estimate, per cached token and decode step."""
    exact: bool
    """Whether outputs equal the model's own."""


@dataclass(frozen=True, slots=True)
class TierSeconds:
    """What a cached token of a tier costs a decode step, in seconds."""

    tier: Tier
    seconds_per_cached_token: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Coefficients of a worker's iteration time in seconds.

    An iteration takes base + per_token · new tokens + per_sequence · sequences +
    per_attention_pair · Σ n·(c + n/2) over prefills of n tokens on c cached ones +
    Σ_tier per_cached_token · cached tokens of decodes in that tier.
    """

    base_seconds: float
    seconds_per_token: float
    seconds_per_sequence: float
    seconds_per_attention_pair: float
    tiers: tuple[TierSeconds, ...]


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One attached worker."""

    worker_id: str
    device: str
    num_units: int
    num_used_units: int
    block_size: int
    """Tokens per block."""
    unit_bytes: int
    tiers: tuple[TierStatus, ...]
    num_plans_in_flight: int
    num_steps: int
    gap_share: float
    """Share of the time between steps in all busy time; 0 to 1."""
    resident_bytes: int
    """Resident memory of the worker's process, as it registered."""
    max_num_seqs: int
    """Most sequences in one batch."""
    max_num_batched_tokens: int
    """Most new tokens in one batch."""
    calibration: Calibration
    """Current estimate of its speed."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Totals since the service started."""

    num_accepted: int
    num_finished: int
    num_aborted: int
    num_failed: int
    num_rejected: int
    """Refused because the queue was full."""
    num_preemptions: int
    num_promotions: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_objectives_met: int


@dataclass(frozen=True, slots=True)
class Status:
    """The state of the service."""

    version: str
    policy: str
    pipeline_depth: int
    accepting: bool
    """Whether new requests are accepted."""
    model: str
    """Empty before a worker has attached."""
    workers: tuple[WorkerStatus, ...]
    num_waiting: int
    num_running: int
    oldest_wait_seconds: float
    uptime_seconds: float
    totals: Totals
    resident_bytes: int
    """Resident memory of the scheduler's process."""


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A request's part of a plan: tokens ``[num_computed_tokens, +num_new_tokens)``."""

    request_id: str
    tier: Tier
    num_computed_tokens: int
    num_new_tokens: int


@dataclass(frozen=True, slots=True)
class PlanReport:
    """One plan that was sent to a worker, and why."""

    worker_id: str
    plan_id: int
    reason: str
    decision_seconds: float
    planned: tuple[PlannedRequest, ...]
    preempted_request_ids: tuple[str, ...]
    promoted_request_ids: tuple[str, ...]
    num_waiting: int
    num_used_units: int
    num_dropped: int
    """Plans that this reader missed before this one."""
