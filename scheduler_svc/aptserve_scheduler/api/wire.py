"""Translation between ``aptserve.v1`` worker messages and the values of the core.

Two things pass through the core untouched and stay messages: the sampling parameters of a request
and the logprobs of its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from aptserve.errors import InvalidArgumentError, ProtocolError
from aptserve.v1 import types_pb2, worker_pb2
from google.protobuf import duration_pb2

from aptserve_scheduler.core.types import (
    BatchPlan,
    CostCoefficients,
    FinishReason,
    NewSequence,
    PlanId,
    SequenceFailure,
    SequenceId,
    SequenceOutput,
    StepResult,
    Tier,
    TierSpec,
    WorkerId,
    WorkerSpec,
)

PROTOCOL_VERSION = 1
_MAX_ID_LENGTH = 128
_MAX_SIZE = 2**53
"""Counts of a pool beyond this are no counts: they would not survive a float."""

TIER_TO_PROTO: dict[Tier, types_pb2.CacheTier.ValueType] = {
    Tier.KV: types_pb2.CACHE_TIER_KV,
    Tier.HIDDEN: types_pb2.CACHE_TIER_HIDDEN,
    Tier.KV8: types_pb2.CACHE_TIER_KV8,
}
REASON_TO_PROTO: dict[FinishReason, types_pb2.FinishReason.ValueType] = {
    FinishReason.STOP: types_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: types_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: types_pb2.FINISH_REASON_ABORT,
}
_TIER_FROM_PROTO = {value: tier for tier, value in TIER_TO_PROTO.items()}
_WORKER_REASON_FROM_PROTO: dict[int, FinishReason | None] = {
    types_pb2.FINISH_REASON_UNSPECIFIED: None,
    types_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    types_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


def worker_spec_from_proto(register: worker_pb2.Register) -> WorkerSpec:
    """What a worker can do. Raises :class:`InvalidArgumentError` naming the field."""
    check_id("register.worker_id", register.worker_id)
    pool = register.pool
    for name, value in (
        ("pool.num_units", pool.num_units),
        ("pool.block_size", pool.block_size),
        ("max_num_seqs", register.max_num_seqs),
        ("max_num_batched_tokens", register.max_num_batched_tokens),
    ):
        if not 1 <= value <= _MAX_SIZE:
            raise InvalidArgumentError(f"register.{name}", f"must be in [1, {_MAX_SIZE}]")
    return WorkerSpec(
        worker_id=WorkerId(register.worker_id),
        num_units=pool.num_units,
        block_size=pool.block_size,
        tiers=_tiers(pool),
        max_num_seqs=register.max_num_seqs,
        max_num_batched_tokens=register.max_num_batched_tokens,
        cost=_cost(register.calibration),
    )


def to_duration(seconds: float) -> duration_pb2.Duration:
    """A Duration of so many seconds."""
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def check_id(field: str, value: str) -> None:
    """Names of workers and requests: 1 to 128 printable characters."""
    if not 1 <= len(value) <= _MAX_ID_LENGTH:
        raise InvalidArgumentError(field, f"must have 1 to {_MAX_ID_LENGTH} characters")
    if not value.isprintable():
        raise InvalidArgumentError(field, "must be printable")


def _tiers(pool: worker_pb2.PoolInfo) -> tuple[TierSpec, ...]:
    field = "register.pool.tiers"
    tiers: list[TierSpec] = []
    for info in pool.tiers:
        tier = _TIER_FROM_PROTO.get(info.tier)
        if tier is None or any(t.tier is tier for t in tiers):
            raise InvalidArgumentError(f"{field}.tier", f"unknown or repeated tier {info.tier}")
        if not 1 <= info.units_per_block <= pool.num_units:
            raise InvalidArgumentError(
                f"{field}.units_per_block", f"must be in [1, {pool.num_units}], the units there are"
            )
        tiers.append(TierSpec(tier, info.units_per_block, info.exact))
    if not tiers or tiers[0].tier is not Tier.KV:
        raise InvalidArgumentError(field, "must start with CACHE_TIER_KV")
    return tuple(tiers)


def _cost(calibration: worker_pb2.Calibration) -> CostCoefficients:
    names = (
        "base_seconds",
        "seconds_per_token",
        "seconds_per_sequence",
        "seconds_per_attention_pair",
    )
    values: dict[str, float] = {name: getattr(calibration, name) for name in names}
    tiers: dict[Tier, float] = {}
    for info in calibration.tiers:
        tier = _TIER_FROM_PROTO.get(info.tier)
        if tier is None:
            raise InvalidArgumentError("register.calibration.tiers.tier", f"unknown: {info.tier}")
        tiers[tier] = info.seconds_per_cached_token
    for name, value in [*values.items(), *(("tiers", v) for v in tiers.values())]:
        if not (math.isfinite(value) and value >= 0):
            raise InvalidArgumentError(f"register.calibration.{name}", "must be finite and >= 0")
    return CostCoefficients(seconds_per_cached_token=tiers, **values)


def cost_to_proto(cost: CostCoefficients) -> worker_pb2.Calibration:
    """The message of an estimate, tiers in the order of their numbers."""
    return worker_pb2.Calibration(
        base_seconds=cost.base_seconds,
        seconds_per_token=cost.seconds_per_token,
        seconds_per_sequence=cost.seconds_per_sequence,
        seconds_per_attention_pair=cost.seconds_per_attention_pair,
        tiers=[
            worker_pb2.TierSeconds(tier=TIER_TO_PROTO[tier], seconds_per_cached_token=seconds)
            for tier, seconds in sorted(cost.seconds_per_cached_token.items())
        ],
    )


def plan_to_proto(plan: BatchPlan) -> worker_pb2.AttachResponse:
    """A plan for its worker."""
    return worker_pb2.AttachResponse(
        batch_plan=worker_pb2.BatchPlan(
            plan_id=plan.plan_id,
            release_sequence_ids=plan.release,
            promote_sequence_ids=plan.promote,
            new_sequences=[_new_sequence(n) for n in plan.new],
            scheduled=[
                worker_pb2.ScheduledSequence(
                    sequence_id=s.sequence_id,
                    num_computed_tokens=s.num_computed_tokens,
                    num_new_tokens=s.num_new_tokens,
                )
                for s in plan.scheduled
            ],
        )
    )


def release_to_proto(sequence_ids: Sequence[SequenceId]) -> worker_pb2.AttachResponse:
    """Sequences to forget while no plan is due."""
    return worker_pb2.AttachResponse(release=worker_pb2.Release(sequence_ids=sequence_ids))


def _new_sequence(new: NewSequence) -> worker_pb2.NewSequence:
    if not isinstance(new.sampling, types_pb2.SamplingParams):
        raise TypeError("the sampling of a request must be the completed message")
    message = worker_pb2.NewSequence(
        sequence_id=new.sequence_id,
        request_id=new.request_id,
        token_ids=new.token_ids,
        num_prompt_tokens=new.num_prompt_tokens,
        tier=TIER_TO_PROTO[new.tier],
        sampling=new.sampling,
    )
    message.sampling.max_tokens = new.max_tokens
    return message


def step_result_from_proto(message: worker_pb2.StepResult) -> StepResult:
    """A worker's answer. Raises :class:`ProtocolError` for values that cannot be."""
    for name, seconds in (("step", message.step_seconds), ("gap", message.gap_seconds)):
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ProtocolError(f"step result {message.plan_id}: {name}_seconds is {seconds}")
    return StepResult(
        plan_id=PlanId(message.plan_id),
        outputs=tuple(_output(o) for o in message.outputs),
        step_seconds=message.step_seconds,
        gap_seconds=message.gap_seconds,
        num_free_units=message.num_free_units,
        skipped=tuple(SequenceId(i) for i in message.skipped_sequence_ids),
        failures=tuple(
            SequenceFailure(SequenceId(f.sequence_id), f.message) for f in message.failures
        ),
    )


def _output(message: worker_pb2.SequenceOutput) -> SequenceOutput:
    if message.finish_reason not in _WORKER_REASON_FROM_PROTO:
        raise ProtocolError(
            f"sequence {message.sequence_id}: no worker ends it by {message.finish_reason}"
        )
    if message.logprobs and len(message.logprobs) != len(message.token_ids):
        raise ProtocolError(
            f"sequence {message.sequence_id}: {len(message.logprobs)} logprobs "
            f"for {len(message.token_ids)} tokens"
        )
    return SequenceOutput(
        sequence_id=SequenceId(message.sequence_id),
        token_ids=tuple(message.token_ids),
        finish_reason=_WORKER_REASON_FROM_PROTO[message.finish_reason],
        logprobs=tuple(message.logprobs) or None,
    )
