"""Plans launched before the step before is collected: the same answers as one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from aptserve_worker.engine import ModelEngine
from aptserve_worker.plan import (
    BatchPlan,
    FinishReason,
    NewSequence,
    PlanError,
    Sampling,
    ScheduledSequence,
    Tier,
)
from support.ahead import RandomPlanner, assert_same, plan_and_run_ahead, run_ahead, run_one_by_one
from support.engines import make_engine
from support.models import greedy, make_model, save_model

Checkpoint = Callable[[str], Path]
PROMPT = [82, 89, 40]  # the first tokens of its answer are all different


def part(sequence_id: int, done: int, count: int = 1) -> ScheduledSequence:
    return ScheduledSequence(sequence_id, done, count)


def new(
    sequence_id: int, tokens: list[int] = PROMPT, tier: Tier = Tier.KV, **sampling: Any
) -> NewSequence:
    values: dict[str, Any] = {"max_tokens": 30, "seed": 0, "ignore_eos": True, **sampling}
    return NewSequence(sequence_id, "r", tokens, len(tokens), tier, Sampling(**values))


def first(*sequences: NewSequence) -> BatchPlan:
    """The prompts."""
    parts = [part(s.sequence_id, 0, len(s.token_ids)) for s in sequences]
    return BatchPlan(1, new=sequences, scheduled=parts)


def decodes(sequence_id: int, start: int, count: int) -> list[BatchPlan]:
    """One token each."""
    return [BatchPlan(0, scheduled=[part(sequence_id, start + i)]) for i in range(count)]


@pytest.fixture(params=["off", "eager"])
def engine(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Iterator[ModelEngine]:
    made = make_engine(checkpoint("opt"), graphs=request.param, max_num_seqs=8)
    yield made
    made.reset()
    assert made.allocator.num_free == made.allocator.num_units


@pytest.fixture(scope="module")
def answer() -> list[int]:
    """What the model says to ``PROMPT``."""
    return greedy(make_model("opt"), PROMPT, 12)


def tokens_of(outputs: Any, sequence_id: int = 1) -> list[int]:
    return [
        t for o in outputs for s in o.outputs if s.sequence_id == sequence_id for t in s.token_ids
    ]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("opt", {"graphs": "off"}),
        ("opt", {"graphs": "eager"}),
        ("opt", {"graphs": "eager", "kernels": "reference", "tiers": "kv,hidden,kv8"}),
        ("llama", {"graphs": "off"}),
        ("llama", {"graphs": "eager", "tiers": "kv,hidden,kv8"}),
        ("llama-grouped", {"graphs": "eager"}),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_random_plans(
    name: str, settings: dict[str, Any], seed: int, checkpoint: Checkpoint
) -> None:
    engine = make_engine(checkpoint(name), max_num_seqs=6, **settings)
    planner = RandomPlanner(seed, [t.tier for t in engine.info.tiers], max_num_seqs=6)
    work, outputs = plan_and_run_ahead(engine, planner, num_steps=100)
    assert any(o.skipped for o in outputs)
    assert any(s.finish_reason for o in outputs for s in o.outputs)
    engine.reset()
    assert_same(outputs, run_one_by_one(engine, work))
    engine.reset()
    assert engine.allocator.num_free == engine.allocator.num_units


def test_tokens_stay_on_the_device(engine: ModelEngine, answer: list[int]) -> None:
    outputs = run_ahead(engine, [first(new(1)), *decodes(1, 3, 11)])
    assert tokens_of(outputs) == answer


@pytest.mark.parametrize("at", range(1, 7))
def test_an_end_that_the_step_under_way_does_not_know_of(
    at: int, engine: ModelEngine, answer: list[int]
) -> None:
    """Where a block begins with that step, it takes memory for nothing."""
    stop = answer[at]
    end = answer.index(stop)
    work = [
        first(new(1, stop_token_ids=frozenset({stop})), new(2)),
        *(BatchPlan(0, scheduled=[part(1, 3 + i), part(2, 3 + i)]) for i in range(end + 1)),
        BatchPlan(0, release=[1], new=[new(3)], scheduled=[part(3, 0, 3), part(2, 4 + end)]),
    ]
    outputs = run_ahead(engine, work)
    assert tokens_of(outputs) == answer[: end + 1]
    assert outputs[end].outputs[0].finish_reason is FinishReason.STOP
    assert outputs[end + 1].skipped == [1]
    assert tokens_of(outputs, 3) == answer[:1]
    engine.reset()
    assert_same(outputs, run_one_by_one(engine, work))


@pytest.mark.parametrize("sampling", [{"max_tokens": 3}, {"max_tokens": 2, "num_logprobs": 1}])
def test_nothing_runs_past_the_last_token(
    sampling: dict[str, Any], engine: ModelEngine, answer: list[int]
) -> None:
    count = sampling["max_tokens"]
    outputs = run_ahead(engine, [first(new(1, **sampling)), *decodes(1, 3, count)])
    assert tokens_of(outputs) == answer[:count]
    assert outputs[count - 1].outputs[0].finish_reason is FinishReason.LENGTH
    assert outputs[count].skipped == [1]
    assert len(engine._sequences[1].units) == 2 * -(-(2 + count) // 4)


def test_the_context_ends_a_sequence_with_its_last_token_under_way(
    checkpoint: Checkpoint,
) -> None:
    engine = make_engine(checkpoint("opt"))
    context = engine.info.context_length
    work = [first(new(1, [5] * (context - 1))), *decodes(1, context - 1, 2)]
    outputs = run_ahead(engine, work)
    assert [o.finish_reason for s in outputs for o in s.outputs] == [None, FinishReason.LENGTH]
    assert outputs[2].skipped == [1]


def test_a_released_sequence_still_gives_the_token_under_way(
    engine: ModelEngine, answer: list[int]
) -> None:
    """Preempted; its row and units go to another at once, and it comes back in a third."""
    back = NewSequence(3, "r", [*PROMPT, *answer[:2]], 3, Tier.HIDDEN, new(3).sampling)
    work = [
        first(new(1, max_tokens=4)),
        *decodes(1, 3, 1),
        BatchPlan(0, release=[1], new=[new(2, [7, 8])], scheduled=[part(2, 0, 2)]),
        (12345,),
        BatchPlan(0, new=[back], scheduled=[part(3, 0, 5), part(2, 2)]),
        BatchPlan(0, release=[2], scheduled=[part(3, 5)]),
    ]
    outputs = run_ahead(engine, work)
    assert tokens_of(outputs) == answer[:2]
    assert tokens_of(outputs, 3) == answer[2:4]
    assert tokens_of(outputs, 2) == greedy(make_model("opt"), [7, 8], 2)
    engine.reset()
    assert_same(outputs, run_one_by_one(engine, work))


def test_a_release_between_plans_while_both_run(engine: ModelEngine, answer: list[int]) -> None:
    work = [
        first(new(1, stop_token_ids=frozenset({answer[1]}))),
        *decodes(1, 3, 2),
        (1,),
        first(new(2)),
    ]
    outputs = run_ahead(engine, work)
    assert outputs[2].skipped == [1]
    engine.reset()
    assert_same(outputs, run_one_by_one(engine, work))


@pytest.mark.parametrize("ends", [False, True])
def test_promotion_while_a_step_runs(ends: bool, engine: ModelEngine, answer: list[int]) -> None:
    stops = frozenset({answer[2]}) if ends else frozenset[int]()
    work = [
        first(new(1, tier=Tier.HIDDEN, stop_token_ids=stops)),
        *decodes(1, 3, 2),
        BatchPlan(0, promote=[1], scheduled=[part(1, 5)]),
        *decodes(1, 6, 3),
    ]
    work = work[:4] if ends else work
    outputs = run_ahead(engine, work)
    assert tokens_of(outputs) == answer[: 3 if ends else 7]
    engine.reset()
    assert_same(outputs, run_one_by_one(engine, work))


def test_a_last_chunk_of_one_token_is_known_to_the_host(
    engine: ModelEngine, answer: list[int]
) -> None:
    work = [
        BatchPlan(1, new=[new(1), new(2)], scheduled=[part(1, 0, 2), part(2, 0, 3)]),
        BatchPlan(2, scheduled=[part(1, 2), part(2, 3)]),
        BatchPlan(3, scheduled=[part(1, 3), part(2, 4)]),
    ]
    outputs = run_ahead(engine, work)
    assert tokens_of(outputs) == answer[:2]
    assert tokens_of(outputs, 2) == answer[:3]


def test_a_wrong_plan_leaves_the_step_under_way_alone(
    engine: ModelEngine, answer: list[int]
) -> None:
    engine.launch(first(new(1)))
    with pytest.raises(PlanError, match=r"plan computes \[4, 5\), 3 of 4 are computed"):
        engine.launch(BatchPlan(2, scheduled=[part(1, 4)]))
    assert tokens_of([engine.collect()]) == answer[:1]


def test_more_than_two_steps_are_not_launched(engine: ModelEngine) -> None:
    engine.launch(first(new(1)))
    engine.launch(*decodes(1, 3, 1))
    with pytest.raises(RuntimeError, match="2 steps are launched"):
        engine.launch(*decodes(1, 4, 1))


def test_a_reset_forgets_the_steps_under_way(engine: ModelEngine, answer: list[int]) -> None:
    engine.launch(first(new(1)))
    engine.launch(*decodes(1, 3, 1))
    engine.reset()
    assert tokens_of(run_ahead(engine, [first(new(1)), *decodes(1, 3, 2)])) == answer[:3]


def test_a_sequence_that_fails_is_skipped_by_the_step_under_way(tmp_path: Path) -> None:
    engine = make_engine(save_model(tmp_path, "opt"), graphs="eager", max_num_seqs=4)
    with torch.no_grad():  # a token whose embedding is broken
        engine._runner._model.get_input_embeddings().weight[50] = float("nan")
    work = [
        first(new(1, [50]), new(2)),
        BatchPlan(2, scheduled=[part(1, 1), part(2, 3)]),
        BatchPlan(3, release=[1], scheduled=[part(2, 4)]),
    ]
    outputs = run_ahead(engine, work)
    assert [[s for s, _ in o.failures] for o in outputs] == [[1], [], []]
    assert outputs[1].skipped == [1]
    engine.reset()
    assert_same(outputs, run_one_by_one(engine, work))


@pytest.mark.parametrize(("setting", "overlaps"), [("auto", False), ("off", False), ("on", True)])
def test_overlapping_is_a_setting(setting: str, overlaps: bool, checkpoint: Checkpoint) -> None:
    assert make_engine(checkpoint("opt"), overlap=setting).overlaps is overlaps
