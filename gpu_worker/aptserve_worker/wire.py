"""Translation between ``aptserve.v1`` worker messages and the values of :mod:`.plan`.

Protobuf stops here: the session reads plans with :func:`plan_from_proto` and writes with
:func:`register_to_proto` and :func:`step_result_to_proto`; an engine never sees a message.
"""

from __future__ import annotations

from collections.abc import Iterable

from aptserve.v1 import types_pb2, worker_pb2

from aptserve_worker.plan import (
    BatchPlan,
    EngineInfo,
    FinishReason,
    Logprobs,
    NewSequence,
    PlanError,
    Sampling,
    ScheduledSequence,
    SequenceOutput,
    StepOutput,
    Tier,
)

PROTOCOL_VERSION = 1

_FINISH_REASONS = {
    None: types_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: types_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: types_pb2.FINISH_REASON_LENGTH,
}
_TIERS_TO_PROTO = {
    Tier.KV: types_pb2.CACHE_TIER_KV,
    Tier.HIDDEN: types_pb2.CACHE_TIER_HIDDEN,
    Tier.KV8: types_pb2.CACHE_TIER_KV8,
}
_TIERS_FROM_PROTO = {value: tier for tier, value in _TIERS_TO_PROTO.items()}


def plan_from_proto(message: worker_pb2.BatchPlan) -> BatchPlan:
    """The plan of a message. Raises :class:`PlanError` where a required field is unset."""
    return BatchPlan(
        plan_id=message.plan_id,
        release=tuple(message.release_sequence_ids),
        promote=tuple(message.promote_sequence_ids),
        new=tuple(_new_sequence(n) for n in message.new_sequences),
        scheduled=tuple(
            ScheduledSequence(s.sequence_id, s.num_computed_tokens, s.num_new_tokens)
            for s in message.scheduled
        ),
    )


def _new_sequence(message: worker_pb2.NewSequence) -> NewSequence:
    tier = _TIERS_FROM_PROTO.get(message.tier)
    if tier is None:
        raise PlanError(f"sequence {message.sequence_id}: cache tier {message.tier} is unknown")
    return NewSequence(
        sequence_id=message.sequence_id,
        request_id=message.request_id,
        token_ids=tuple(message.token_ids),
        num_prompt_tokens=message.num_prompt_tokens,
        tier=tier,
        sampling=_sampling(message.sequence_id, message.sampling),
    )


def _sampling(sequence_id: int, message: types_pb2.SamplingParams) -> Sampling:
    """Stop strings are left out: they need text, so the scheduler looks for them."""
    if not (message.HasField("max_tokens") and message.HasField("seed")):
        raise PlanError(f"sequence {sequence_id}: sampling must set max_tokens and seed")
    return Sampling(
        max_tokens=message.max_tokens,
        seed=message.seed,
        min_tokens=message.min_tokens,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        min_p=message.min_p,
        repetition_penalty=(
            message.repetition_penalty if message.HasField("repetition_penalty") else 1.0
        ),
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias={entry.token_id: entry.bias for entry in message.logit_bias},
        num_logprobs=message.logprobs if message.HasField("logprobs") else None,
        stop_token_ids=frozenset(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
    )


def register_to_proto(
    info: EngineInfo, *, worker_id: str, resident_bytes: int
) -> worker_pb2.Register:
    """The first message of a stream."""
    return worker_pb2.Register(
        protocol_version=PROTOCOL_VERSION,
        worker_id=worker_id,
        model=worker_pb2.ModelInfo(
            name=info.model_name,
            fingerprint=info.fingerprint,
            architecture=info.architecture,
            context_length=info.context_length,
            vocab_size=info.vocab_size,
            eos_token_ids=info.eos_token_ids,
            tokenizer_json=info.tokenizer_json,
        ),
        pool=_pool(info),
        calibration=_calibration(info),
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        resident_bytes=resident_bytes,
        device=info.device,
    )


def _pool(info: EngineInfo) -> worker_pb2.PoolInfo:
    return worker_pb2.PoolInfo(
        num_units=info.num_units,
        block_size=info.block_size,
        unit_bytes=info.unit_bytes,
        tiers=[
            worker_pb2.TierInfo(
                tier=_TIERS_TO_PROTO[t.tier], units_per_block=t.units_per_block, exact=t.exact
            )
            for t in info.tiers
        ],
    )


def _calibration(info: EngineInfo) -> worker_pb2.Calibration:
    calibration = info.calibration
    return worker_pb2.Calibration(
        base_seconds=calibration.base_seconds,
        seconds_per_token=calibration.seconds_per_token,
        seconds_per_sequence=calibration.seconds_per_sequence,
        seconds_per_attention_pair=calibration.seconds_per_attention_pair,
        tiers=[
            worker_pb2.TierSeconds(
                tier=_TIERS_TO_PROTO[t.tier], seconds_per_cached_token=t.seconds_per_cached_token
            )
            for t in info.tiers
        ],
    )


def step_result_to_proto(
    plan_id: int, output: StepOutput, *, step_seconds: float, gap_seconds: float
) -> worker_pb2.StepResult:
    """The answer to a plan."""
    return worker_pb2.StepResult(
        plan_id=plan_id,
        outputs=[_output(o) for o in output.outputs],
        step_seconds=step_seconds,
        gap_seconds=gap_seconds,
        num_free_units=output.num_free_units,
        skipped_sequence_ids=output.skipped,
        failures=[
            worker_pb2.SequenceFailure(sequence_id=sequence_id, message=message)
            for sequence_id, message in output.failures
        ],
    )


def _output(output: SequenceOutput) -> worker_pb2.SequenceOutput:
    return worker_pb2.SequenceOutput(
        sequence_id=output.sequence_id,
        token_ids=output.token_ids,
        finish_reason=_FINISH_REASONS[output.finish_reason],
        logprobs=[_logprobs(position) for position in output.logprobs],
    )


def _logprobs(position: Logprobs) -> types_pb2.PositionLogprobs:
    chosen, *top = _token_logprobs((position.chosen, *position.top))
    return types_pb2.PositionLogprobs(chosen=chosen, top=top)


def _token_logprobs(pairs: Iterable[tuple[int, float]]) -> list[types_pb2.TokenLogprob]:
    return [types_pb2.TokenLogprob(token_id=t, logprob=p) for t, p in pairs]
