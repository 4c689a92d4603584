"""Every field of the worker protocol crosses the wire."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from aptserve.v1 import types_pb2, worker_pb2
from aptserve_worker import wire
from aptserve_worker.plan import (
    BatchPlan,
    CalibrationInfo,
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
    TierInfo,
)
from google.protobuf.message import Message

SAMPLING = types_pb2.SamplingParams(
    max_tokens=9,
    min_tokens=2,
    temperature=0.5,
    top_k=7,
    top_p=0.25,
    min_p=0.125,
    repetition_penalty=1.5,
    presence_penalty=-0.5,
    frequency_penalty=0.75,
    logit_bias=[types_pb2.LogitBias(token_id=3, bias=-2.0)],
    seed=2**63,
    logprobs=4,
    stop_token_ids=[11, 12],
    stop_strings=["stop"],
    ignore_eos=True,
)
PLAN = worker_pb2.BatchPlan(
    plan_id=5,
    release_sequence_ids=[1, 2],
    promote_sequence_ids=[3],
    new_sequences=[
        worker_pb2.NewSequence(
            sequence_id=4,
            request_id="r4",
            token_ids=[10, 11, 12],
            num_prompt_tokens=2,
            tier=types_pb2.CACHE_TIER_HIDDEN,
            sampling=SAMPLING,
        )
    ],
    scheduled=[
        worker_pb2.ScheduledSequence(sequence_id=4, num_computed_tokens=1, num_new_tokens=2)
    ],
)
INFO = EngineInfo(
    model_name="name",
    fingerprint="print",
    architecture="Arch",
    context_length=10,
    vocab_size=20,
    eos_token_ids=(3,),
    tokenizer_json=b"{}",
    num_units=30,
    block_size=16,
    unit_bytes=40,
    tiers=(TierInfo(Tier.HIDDEN, 1, 0.5, exact=True),),
    calibration=CalibrationInfo(0.1, 0.2, 0.3, 0.4),
    max_num_seqs=50,
    max_num_batched_tokens=60,
    device="cpu",
)


def test_plan_has_every_value_of_the_message() -> None:
    assert wire.plan_from_proto(PLAN) == BatchPlan(
        plan_id=5,
        release=(1, 2),
        promote=(3,),
        new=(
            NewSequence(
                sequence_id=4,
                request_id="r4",
                token_ids=(10, 11, 12),
                num_prompt_tokens=2,
                tier=Tier.HIDDEN,
                sampling=Sampling(
                    max_tokens=9,
                    seed=2**63,
                    min_tokens=2,
                    temperature=0.5,
                    top_k=7,
                    top_p=0.25,
                    min_p=0.125,
                    repetition_penalty=1.5,
                    presence_penalty=-0.5,
                    frequency_penalty=0.75,
                    logit_bias={3: -2.0},
                    num_logprobs=4,
                    stop_token_ids=frozenset({11, 12}),
                    ignore_eos=True,
                ),
            ),
        ),
        scheduled=(ScheduledSequence(4, 1, 2),),
    )


def _paths(message: Message, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every field set in a message, nested and repeated ones included."""
    paths = []
    for field, value in message.ListFields():
        path = (*prefix, field.name)
        paths.append(path)
        first = value[0] if field.is_repeated and len(value) else value
        if isinstance(first, Message):
            paths.extend(_paths(first, path))
    return paths


def _all_fields(descriptor: Any, prefix: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    paths = set()
    for field in descriptor.fields:
        path = (*prefix, field.name)
        paths.add(path)
        if field.message_type is not None:
            paths |= _all_fields(field.message_type, path)
    return paths


def _without(message: worker_pb2.BatchPlan, path: tuple[str, ...]) -> worker_pb2.BatchPlan:
    changed = worker_pb2.BatchPlan.FromString(message.SerializeToString())
    owner: Any = changed
    for name in path[:-1]:
        value = getattr(owner, name)
        owner = value[0] if not isinstance(value, Message) else value
    owner.ClearField(path[-1])
    return changed


@pytest.mark.parametrize("path", sorted(_all_fields(worker_pb2.BatchPlan.DESCRIPTOR)))
def test_no_field_of_a_plan_is_ignored(path: tuple[str, ...]) -> None:
    assert path in _paths(PLAN), "set the new field in PLAN"
    try:
        plan = wire.plan_from_proto(_without(PLAN, path))
    except PlanError:
        return
    is_changed = plan != wire.plan_from_proto(PLAN)
    assert is_changed == (path[-1] != "stop_strings"), "stop strings are the scheduler's"


def test_unset_sampling_fields_have_their_defaults() -> None:
    message = worker_pb2.BatchPlan(
        new_sequences=[
            worker_pb2.NewSequence(
                tier=types_pb2.CACHE_TIER_KV,
                sampling=types_pb2.SamplingParams(max_tokens=1, seed=0),
            )
        ]
    )
    assert wire.plan_from_proto(message).new[0].sampling == Sampling(max_tokens=1, seed=0)


@pytest.mark.parametrize("field", ["max_tokens", "seed", "tier"])
def test_missing_required_field_is_a_plan_error(field: str) -> None:
    path = ("new_sequences", field) if field == "tier" else ("new_sequences", "sampling", field)
    with pytest.raises(PlanError, match="sequence 4"):
        wire.plan_from_proto(_without(PLAN, path))


def test_register_sets_every_field() -> None:
    message = wire.register_to_proto(INFO, worker_id="w", resident_bytes=70)
    assert set(_paths(message)) == _all_fields(worker_pb2.Register.DESCRIPTOR)
    assert message.protocol_version == wire.PROTOCOL_VERSION
    assert message.worker_id == "w"
    assert message.resident_bytes == 70
    for ours, theirs in (
        (INFO, message),
        (INFO, message.model),
        (INFO, message.pool),
        (INFO.calibration, message.calibration),
        (INFO.tiers[0], message.pool.tiers[0]),
        (INFO.tiers[0], message.calibration.tiers[0]),
    ):
        _assert_same_named_fields_agree(ours, theirs)


def _assert_same_named_fields_agree(ours: Any, theirs: Any) -> None:
    names = {f.name for f in dataclasses.fields(ours)}
    for field in theirs.DESCRIPTOR.fields:
        if field.name in names and field.message_type is None:
            value = getattr(ours, field.name)
            actual = getattr(theirs, field.name)
            assert (tuple(actual) if isinstance(value, tuple) else actual) == value, field.name


def test_step_result_sets_every_field() -> None:
    output = StepOutput(
        outputs=(
            SequenceOutput(4, (10, 11), FinishReason.STOP, (Logprobs((10, -0.5), ((11, -1.0),)),)),
        ),
        skipped=(5,),
        failures=((6, "why"),),
        num_free_units=7,
    )
    message = wire.step_result_to_proto(3, output, step_seconds=0.25, gap_seconds=0.125)
    assert set(_paths(message)) == _all_fields(worker_pb2.StepResult.DESCRIPTOR)
    assert message == worker_pb2.StepResult(
        plan_id=3,
        outputs=[
            worker_pb2.SequenceOutput(
                sequence_id=4,
                token_ids=[10, 11],
                finish_reason=types_pb2.FINISH_REASON_STOP,
                logprobs=[
                    types_pb2.PositionLogprobs(
                        chosen=types_pb2.TokenLogprob(token_id=10, logprob=-0.5),
                        top=[types_pb2.TokenLogprob(token_id=11, logprob=-1.0)],
                    )
                ],
            )
        ],
        step_seconds=0.25,
        gap_seconds=0.125,
        num_free_units=7,
        skipped_sequence_ids=[5],
        failures=[worker_pb2.SequenceFailure(sequence_id=6, message="why")],
    )


@pytest.mark.parametrize("tier", list(Tier))
def test_every_tier_has_its_number(tier: Tier) -> None:
    assert types_pb2.CacheTier.Value(f"CACHE_TIER_{tier.name}") == tier
