from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from aptserve_worker.fake import FakeEngine, FakeModel, byte_tokenizer_json, expected_tokens
from aptserve_worker.fake.faults import Fault, FaultKind, FaultPlan
from aptserve_worker.plan import (
    BatchPlan,
    FinishReason,
    NewSequence,
    PlanError,
    Sampling,
    ScheduledSequence,
    StepOutput,
    Tier,
)
from tokenizers import Tokenizer

MODEL = FakeModel(num_units=8, block_size=4)


def make_new(
    sequence_id: int = 1, num_prompt_tokens: int = 4, tier: Tier = Tier.KV, **sampling: Any
) -> NewSequence:
    sampling = {"max_tokens": 100, "seed": 0, **sampling}
    tokens = tuple(range(num_prompt_tokens))
    return NewSequence(sequence_id, "r", tokens, num_prompt_tokens, tier, Sampling(**sampling))


def run(
    engine: FakeEngine,
    *parts: tuple[int, int, int],
    new: tuple[NewSequence, ...] = (),
    **more: Any,
) -> StepOutput:
    output = engine.execute(
        BatchPlan(1, new=new, scheduled=[ScheduledSequence(*part) for part in parts], **more)
    )
    engine.check_integrity()
    return output


def test_tokenizer_is_one_token_per_byte() -> None:
    tokenizer = Tokenizer.from_str(byte_tokenizer_json().decode())
    text = "def f(x):\n\treturn 'é€😀\x00\x7f'  "
    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.decode([256, 104, 105], skip_special_tokens=True) == "hi"


def test_tokens_depend_on_tokens_only_when_greedy() -> None:
    greedy = Sampling(max_tokens=20, seed=1)
    other_seed = Sampling(max_tokens=20, seed=2)
    assert expected_tokens(MODEL, [1], greedy) == expected_tokens(MODEL, [1], other_seed)
    assert expected_tokens(MODEL, [1], greedy) != expected_tokens(MODEL, [2], greedy)
    hot, hotter = (Sampling(max_tokens=20, seed=s, temperature=1.0) for s in (1, 2**40))
    assert expected_tokens(MODEL, [1], hot) != expected_tokens(MODEL, [1], hotter)


def test_chunked_prefill_and_recompute_give_the_same_tokens() -> None:
    expected, _ = expected_tokens(MODEL, range(4), Sampling(max_tokens=3, seed=0))
    engine = FakeEngine(MODEL)
    assert not run(engine, (1, 0, 3), new=(make_new(),)).outputs
    tokens = [run(engine, (1, at, 1)).outputs[0].token_ids[0] for at in (3, 4)]
    engine.release([1])
    known = make_new(2)
    again = NewSequence(2, "r", (*known.token_ids, *tokens), 4, Tier.HIDDEN, known.sampling)
    tokens += run(engine, (2, 0, 6), new=(again,)).outputs[0].token_ids
    assert tokens == expected


def test_units_are_counted_by_tier() -> None:
    engine = FakeEngine(MODEL)
    output = run(engine, (1, 0, 4), (2, 0, 4), new=(make_new(1), make_new(2, tier=Tier.HIDDEN)))
    assert output.num_free_units == 8 - 2 - 1
    assert run(engine, (1, 4, 1), (2, 4, 1)).num_free_units == 8 - 4 - 2
    assert run(engine, promote=(2,)).num_free_units == 8 - 4 - 4
    assert run(engine, release=(1, 77)).num_free_units == 4
    engine.reset()
    assert engine.num_free_units == 8


@pytest.mark.parametrize(
    ("sampling", "num_tokens", "reason"),
    [
        ({"max_tokens": 2}, 2, FinishReason.LENGTH),
        ({}, 3, FinishReason.STOP),
        ({"min_tokens": 5}, 6, FinishReason.STOP),
        ({"ignore_eos": True, "max_tokens": 7}, 7, FinishReason.LENGTH),
        ({"stop_token_ids": frozenset(range(256))}, 1, FinishReason.STOP),
    ],
)
def test_ends_by_the_rules(sampling: dict[str, Any], num_tokens: int, reason: FinishReason) -> None:
    model = FakeModel(eos_after=3)
    sampling = {"max_tokens": 100, "seed": 0, **sampling}
    tokens, actual = expected_tokens(model, [1, 2], Sampling(**sampling))
    assert (len(tokens), actual) == (num_tokens, reason)


def test_full_context_ends_a_sequence() -> None:
    model = FakeModel(context_length=5)
    tokens, reason = expected_tokens(model, [1, 2], Sampling(max_tokens=100, seed=0))
    assert (len(tokens), reason) == (4, FinishReason.LENGTH)


def test_stop_token_is_not_chosen_before_min_tokens() -> None:
    model = FakeModel(alphabet=(1, 2))
    sampling = Sampling(max_tokens=9, seed=0, min_tokens=5, stop_token_ids=frozenset({1}))
    tokens, _ = expected_tokens(model, [7], sampling)
    assert tokens[:5] == [2] * 5


def test_ended_sequence_is_skipped_and_keeps_its_units() -> None:
    engine = FakeEngine(MODEL)
    run(engine, (1, 0, 4), new=(make_new(max_tokens=1),))
    output = run(engine, (1, 4, 1))
    assert (output.skipped, output.outputs, output.num_free_units) == ([1], [], 6)


def test_outputs_are_handed_over_in_the_order_launched() -> None:
    plans = [
        BatchPlan(1, new=(make_new(max_tokens=1),), scheduled=(ScheduledSequence(1, 0, 4),)),
        BatchPlan(2, scheduled=(ScheduledSequence(1, 4, 1),)),
    ]
    alone, ahead = FakeEngine(MODEL), FakeEngine(MODEL, overlaps=True)
    for plan in plans:
        ahead.launch(plan).wait()
    with pytest.raises(RuntimeError, match="2 steps are launched"):
        ahead.launch(plans[1])
    assert [ahead.collect() for _ in plans] == [alone.execute(plan) for plan in plans]


def test_logprobs_have_the_shape_asked_for() -> None:
    engine = FakeEngine(MODEL)
    news = (make_new(1), make_new(2, num_logprobs=0), make_new(3, num_logprobs=2))
    outputs = run(engine, (1, 0, 4), (2, 0, 4), (3, 0, 4), new=news).outputs
    assert [len(o.logprobs) for o in outputs] == [0, 1, 1]
    assert [len(o.logprobs[0].top) for o in outputs[1:]] == [0, 2]
    assert all(o.logprobs[0].chosen[0] == o.token_ids[0] for o in outputs[1:])


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (BatchPlan(1, promote=(9,)), "sequence 9 is not known"),
        (BatchPlan(1, promote=(1,)), "to promote is in tier KV"),
        (BatchPlan(1, new=(make_new(1),)), "known already"),
        (BatchPlan(1, new=(make_new(2, num_prompt_tokens=0),)), "0 prompt tokens of 0"),
        (BatchPlan(1, new=(make_new(2, num_prompt_tokens=300),)), "vocabulary"),
        (BatchPlan(1, scheduled=(ScheduledSequence(9, 0, 1),)), "sequence 9 is not known"),
        (BatchPlan(1, scheduled=(ScheduledSequence(1, 3, 1),)), "4 computed .* plan says 3"),
        (BatchPlan(1, scheduled=(ScheduledSequence(1, 4, 2),)), r"tokens \[4, 6\) of 5"),
        (BatchPlan(1, scheduled=(ScheduledSequence(1, 4, 0),)), r"tokens \[4, 4\) of 5"),
        (BatchPlan(1, scheduled=(ScheduledSequence(1, 4, 1),) * 2), "scheduled twice"),
        (BatchPlan(1, release=(1,), scheduled=(ScheduledSequence(1, 4, 1),)), "not known"),
        (
            BatchPlan(
                1,
                new=(make_new(2, num_prompt_tokens=13),),
                scheduled=(ScheduledSequence(2, 0, 13),),
            ),
            "needs 8 more units, 6 are free",
        ),
    ],
)
def test_wrong_plan_is_refused(plan: BatchPlan, message: str) -> None:
    engine = FakeEngine(MODEL)
    run(engine, (1, 0, 4), new=(make_new(),))
    with pytest.raises(PlanError, match=message):
        engine.execute(plan)
    engine.check_integrity()


def test_limits_and_tiers_are_kept() -> None:
    engine = FakeEngine(FakeModel(max_num_seqs=1, max_num_batched_tokens=3, tiers=MODEL.tiers[:1]))
    with pytest.raises(PlanError, match="no tier HIDDEN"):
        run(engine, new=(make_new(tier=Tier.HIDDEN),))
    engine.reset()
    with pytest.raises(PlanError, match="4 new tokens, at most 3"):
        run(engine, (1, 0, 4), new=(make_new(),))
    with pytest.raises(PlanError, match="2 sequences, at most 1"):
        run(engine, (1, 0, 1), (2, 0, 1), new=(make_new(2),))


def test_nan_fault_fails_one_sequence() -> None:
    engine = FakeEngine(MODEL, faults=FaultPlan([Fault(1, FaultKind.NAN)]))
    output = run(engine, (1, 0, 4), (2, 0, 4), new=(make_new(1), make_new(2)))
    assert output.failures == [(1, "logits are not finite")]
    assert [o.sequence_id for o in output.outputs] == [2]
    assert run(engine, (1, 4, 1)).skipped == [1]


def test_inconsistent_model_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size=100"):
        FakeModel(vocab_size=100)
    with pytest.raises(ValueError, match="alphabet"):
        FakeModel(alphabet=())


def test_fake_needs_no_torch() -> None:
    code = (
        "import sys, aptserve_worker.fake, aptserve_worker.main, aptserve_worker.config;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'tokenizers')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
