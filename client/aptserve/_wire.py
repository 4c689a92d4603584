"""Translation between ``aptserve.v1`` messages and the values of :mod:`aptserve.types`."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf import duration_pb2

from aptserve import types
from aptserve.errors import InternalError
from aptserve.v1 import admin_pb2, inference_pb2, types_pb2, worker_pb2

_TIERS = {
    types_pb2.CACHE_TIER_KV: types.Tier.KV,
    types_pb2.CACHE_TIER_HIDDEN: types.Tier.HIDDEN,
    types_pb2.CACHE_TIER_KV8: types.Tier.KV8,
}
_FINISH_REASONS = {
    types_pb2.FINISH_REASON_STOP: types.FinishReason.STOP,
    types_pb2.FINISH_REASON_LENGTH: types.FinishReason.LENGTH,
    types_pb2.FINISH_REASON_ABORT: types.FinishReason.ABORT,
}


def to_duration(seconds: float) -> duration_pb2.Duration:
    """A Duration, to the nanosecond."""
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def to_seconds(duration: duration_pb2.Duration) -> float:
    """Seconds of a Duration."""
    return duration.seconds + duration.nanos * 1e-9


def objectives_to_proto(objectives: types.Objectives) -> inference_pb2.Objectives:
    """The message; unset where ``None``."""
    message = inference_pb2.Objectives()
    if objectives.ttft_seconds is not None:
        message.ttft.CopyFrom(to_duration(objectives.ttft_seconds))
    if objectives.tbt_seconds is not None:
        message.tbt.CopyFrom(to_duration(objectives.tbt_seconds))
    return message


def chunk_from_proto(message: inference_pb2.TokenChunk) -> types.Chunk:
    """A piece of an answer."""
    return types.Chunk(
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(_position(position) for position in message.logprobs),
    )


def _position(message: types_pb2.PositionLogprobs) -> types.PositionLogprobs:
    return types.PositionLogprobs(
        chosen=_token_logprob(message.chosen),
        top=tuple(_token_logprob(token) for token in message.top),
    )


def _token_logprob(message: types_pb2.TokenLogprob) -> types.TokenLogprob:
    return types.TokenLogprob(message.token_id, message.logprob)


def finish_reason_from_proto(value: types_pb2.FinishReason.ValueType) -> types.FinishReason:
    """Raises :class:`InternalError` for a value that no terminal event may carry."""
    if value not in _FINISH_REASONS:
        raise InternalError(f"unknown finish reason {value}")
    return _FINISH_REASONS[value]


def usage_from_proto(message: inference_pb2.Usage) -> types.Usage:
    """Token counts."""
    return types.Usage(message.num_prompt_tokens, message.num_output_tokens)


def timing_from_proto(message: inference_pb2.Timing) -> types.Timing:
    """Durations of a request."""
    return types.Timing(
        queued_seconds=to_seconds(message.queued),
        time_to_first_token_seconds=(
            to_seconds(message.time_to_first_token)
            if message.HasField("time_to_first_token")
            else None
        ),
        time_between_tokens_p99_seconds=(
            to_seconds(message.time_between_tokens_p99)
            if message.HasField("time_between_tokens_p99")
            else None
        ),
        total_seconds=to_seconds(message.total),
        num_preemptions=message.num_preemptions,
    )


def model_from_proto(message: inference_pb2.GetModelResponse) -> types.ModelInfo:
    """The served model."""
    return types.ModelInfo(
        name=message.model,
        architecture=message.architecture,
        context_length=message.context_length,
        vocab_size=message.vocab_size,
        eos_token_ids=tuple(message.eos_token_ids),
        has_tokenizer=message.has_tokenizer,
        tiers=_tiers(message.tiers),
    )


def _tiers(values: Iterable[types_pb2.CacheTier.ValueType]) -> tuple[types.Tier, ...]:
    """A tier that a newer service has and this SDK does not know is left out."""
    return tuple(_TIERS[value] for value in values if value in _TIERS)


def token_count_from_proto(message: inference_pb2.CountTokensResponse) -> types.TokenCount:
    """Tokens of a text."""
    return types.TokenCount(message.num_tokens, tuple(message.token_ids))


def status_from_proto(message: admin_pb2.GetStatusResponse) -> types.Status:
    """The state of the service."""
    return types.Status(
        version=message.version,
        policy=message.policy,
        pipeline_depth=message.pipeline_depth,
        accepting=message.accepting,
        model=message.model,
        workers=tuple(_worker(worker) for worker in message.workers),
        num_waiting=message.num_waiting,
        num_running=message.num_running,
        oldest_wait_seconds=to_seconds(message.oldest_wait),
        uptime_seconds=to_seconds(message.uptime),
        totals=_totals(message.totals),
        resident_bytes=message.resident_bytes,
    )


def _worker(message: admin_pb2.WorkerStatus) -> types.WorkerStatus:
    return types.WorkerStatus(
        worker_id=message.worker_id,
        device=message.device,
        num_units=message.num_units,
        num_used_units=message.num_used_units,
        block_size=message.block_size,
        unit_bytes=message.unit_bytes,
        tiers=tuple(
            types.TierStatus(
                tier=_TIERS[tier.tier],
                units_per_block=tier.units_per_block,
                num_used_units=tier.num_used_units,
                num_sequences=tier.num_sequences,
                seconds_per_cached_token=tier.seconds_per_cached_token,
                exact=tier.exact,
            )
            for tier in message.tiers
            if tier.tier in _TIERS
        ),
        num_plans_in_flight=message.num_plans_in_flight,
        num_steps=message.num_steps,
        gap_share=message.gap_share,
        resident_bytes=message.resident_bytes,
        max_num_seqs=message.max_num_seqs,
        max_num_batched_tokens=message.max_num_batched_tokens,
        calibration=_calibration(message.calibration),
    )


def _calibration(message: worker_pb2.Calibration) -> types.Calibration:
    return types.Calibration(
        base_seconds=message.base_seconds,
        seconds_per_token=message.seconds_per_token,
        seconds_per_sequence=message.seconds_per_sequence,
        seconds_per_attention_pair=message.seconds_per_attention_pair,
        tiers=tuple(
            types.TierSeconds(_TIERS[tier.tier], tier.seconds_per_cached_token)
            for tier in message.tiers
            if tier.tier in _TIERS
        ),
    )


def _totals(message: admin_pb2.Totals) -> types.Totals:
    return types.Totals(
        num_accepted=message.num_accepted,
        num_finished=message.num_finished,
        num_aborted=message.num_aborted,
        num_failed=message.num_failed,
        num_rejected=message.num_rejected,
        num_preemptions=message.num_preemptions,
        num_promotions=message.num_promotions,
        num_prompt_tokens=message.num_prompt_tokens,
        num_output_tokens=message.num_output_tokens,
        num_objectives_met=message.num_objectives_met,
    )


def plan_from_proto(message: admin_pb2.WatchPlansResponse) -> types.PlanReport:
    """One plan that was sent to a worker."""
    return types.PlanReport(
        worker_id=message.worker_id,
        plan_id=message.plan_id,
        reason=message.reason,
        decision_seconds=to_seconds(message.decision_time),
        planned=tuple(
            types.PlannedRequest(
                request_id=part.request_id,
                tier=_TIERS[part.tier],
                num_computed_tokens=part.num_computed_tokens,
                num_new_tokens=part.num_new_tokens,
            )
            for part in message.planned
            if part.tier in _TIERS
        ),
        preempted_request_ids=tuple(message.preempted_request_ids),
        promoted_request_ids=tuple(message.promoted_request_ids),
        num_waiting=message.num_waiting,
        num_used_units=message.num_used_units,
        num_dropped=message.num_dropped,
    )
