"""What an engine does with plans, good and bad."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from aptserve_worker import calibration
from aptserve_worker import engine as engine_module
from aptserve_worker.config import WorkerSettings
from aptserve_worker.engine import ModelEngine, load_engine
from aptserve_worker.model.loading import load_model
from aptserve_worker.model.probe import UnsupportedModelError
from aptserve_worker.parallel.group import RankGroup
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
from support.engines import Driver, engine_settings, make_engine
from support.models import CONTEXT, greedy, make_model
from transformers import AutoConfig, AutoModelForCausalLM

Engines = Callable[[str], ModelEngine]
Checkpoints = Callable[[str], Path]


def new_sequence(sequence_id: int, length: int = 3, tier: Tier = Tier.KV) -> NewSequence:
    sampling = Sampling(max_tokens=4, seed=0)
    return NewSequence(sequence_id, "r", [5] * length, length, tier, sampling)


@pytest.fixture
def opt(engine: Engines):
    e = engine("opt")
    yield e
    e.reset()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (BatchPlan(1, scheduled=[ScheduledSequence(9, 0, 1)]), "unknown"),
        (BatchPlan(1, new=[new_sequence(1), new_sequence(1)]), "known"),
        (
            BatchPlan(1, new=[new_sequence(1)], scheduled=[ScheduledSequence(1, 1, 1)]),
            "plan computes",
        ),
        (
            BatchPlan(1, new=[new_sequence(1)], scheduled=[ScheduledSequence(1, 0, 4)]),
            "plan computes",
        ),
        (
            BatchPlan(1, new=[new_sequence(1)], scheduled=[ScheduledSequence(1, 0, 0)]),
            "plan computes",
        ),
        (BatchPlan(1, promote=[7]), "promoted but unknown"),
        (BatchPlan(1, new=[new_sequence(1)], promote=[1]), "promoted but unknown"),
        (BatchPlan(1, new=[new_sequence(i) for i in range(50)]), "more than 40 sequences"),
    ],
)
def test_a_plan_that_disagrees_is_refused(opt: ModelEngine, plan: BatchPlan, message: str):
    with pytest.raises(PlanError, match=message):
        opt.execute(plan)


def test_a_tier_that_is_not_offered_is_refused(engine: Engines):
    e = engine("llama-grouped")
    with pytest.raises(PlanError, match="not offered"):
        e.execute(BatchPlan(1, new=[new_sequence(1, tier=Tier.HIDDEN)]))
    e.reset()


def test_a_plan_beyond_the_pool_is_refused(checkpoint: Checkpoints):
    e = make_engine(checkpoint("opt"), pool_units=4)
    plan = BatchPlan(1, new=[new_sequence(1, 20)], scheduled=[ScheduledSequence(1, 0, 20)])
    with pytest.raises(PlanError, match="needs 10 units, 4 are free"):
        e.execute(plan)


def test_release_frees_exactly_what_was_held(opt: ModelEngine):
    driver = Driver(opt)
    a = driver.add([5] * 9, tier=Tier.KV)  # 3 blocks of 2 units
    b = driver.add([6] * 9, tier=Tier.HIDDEN)  # 3 blocks of 1 unit
    driver.step()
    assert opt.allocator.num_units - opt.allocator.num_free == 9
    opt.release([a, 12345])
    assert opt.allocator.num_units - opt.allocator.num_free == 3
    opt.release([b, b])
    assert opt.allocator.num_free == opt.allocator.num_units
    opt.allocator.check_integrity()


def test_ends_at_eos_and_skips_what_was_planned_ahead(engine: Engines):
    e = engine("opt")
    model = make_model("opt")
    answer = greedy(model, [11, 12, 13], 8)
    stop = answer[4]
    first = answer.index(stop)
    driver = Driver(e)
    s = driver.add([11, 12, 13], max_tokens=8, stop_token_ids=frozenset({stop}))
    for _ in range(first + 1):
        driver.step()
    assert driver.finished[s] is FinishReason.STOP
    assert driver.output(s) == answer[: first + 1]
    late = e.execute(BatchPlan(99, scheduled=[ScheduledSequence(s, len(driver.tokens[s]) - 1, 1)]))
    assert late.skipped == [s]
    assert not late.outputs
    e.release([s])


def test_ends_at_max_tokens_and_at_the_context(engine: Engines):
    e = engine("opt")
    driver = Driver(e)
    short = driver.add([5, 6], max_tokens=2, ignore_eos=True)
    full = driver.add([5] * (CONTEXT - 2), max_tokens=50, ignore_eos=True)
    driver.run()
    assert driver.finished == {short: FinishReason.LENGTH, full: FinishReason.LENGTH}
    assert len(driver.output(short)) == 2
    assert len(driver.output(full)) == 3
    e.release([short, full])


def test_broken_logits_end_one_sequence_only(checkpoint: Checkpoints):
    e = make_engine(checkpoint("opt"))
    model = e._runner._model
    with torch.no_grad():  # a token whose embedding is broken
        model.get_input_embeddings().weight[50] = float("nan")
    driver = Driver(e)
    driver.add([5, 6, 7], max_tokens=3)
    wanted = greedy(make_model("opt"), [5, 6, 7], 3)
    bad = new_sequence(777, 1)
    bad = NewSequence(777, "r", [50], 1, Tier.HIDDEN, bad.sampling)
    good = driver._new[0]
    result = e.execute(
        BatchPlan(
            1,
            new=[bad, good],
            scheduled=[
                ScheduledSequence(777, 0, 1),
                ScheduledSequence(good.sequence_id, 0, 3),
            ],
        )
    )
    assert [s for s, _ in result.failures] == [777]
    assert [o.token_ids for o in result.outputs] == [(wanted[0],)]
    e.release([777])
    # The broken states are still in the freed unit; whoever gets it must not see them.
    again = driver.add([5, 6, 7], tier=Tier.HIDDEN, max_tokens=3)
    driver._new = driver._new[1:]
    del driver.tokens[good.sequence_id]
    driver.run()
    assert driver.output(again) == wanted


def test_a_model_without_the_attention_interface_is_refused(tmp_path: Path):
    config = AutoConfig.for_model(
        "bloom", vocab_size=97, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="BloomForCausalLM does not use"):
        make_engine(tmp_path)


def test_a_missing_model_is_refused(tmp_path: Path):
    with pytest.raises(UnsupportedModelError, match="There is no folder"):
        make_engine(tmp_path / "nothing")


def test_tiers_can_be_chosen_but_not_invented(checkpoint: Checkpoints):
    only = make_engine(checkpoint("opt"), tiers="kv")
    assert [t.tier for t in only.info.tiers] == [Tier.KV]
    with pytest.raises(UnsupportedModelError, match="no hidden tier"):
        make_engine(checkpoint("llama-grouped"), tiers="kv,hidden")


def test_pool_size_from_memory(checkpoint: Checkpoints):
    e = make_engine(checkpoint("opt"), pool_units=None, pool_memory="1MiB")
    assert e.info.num_units == 2**20 // e.info.unit_bytes
    assert e.info.unit_bytes == 4 * 32 * 4 * 3  # tokens, width, float32, layers


def test_fingerprint_tells_weights_apart(checkpoint: Checkpoints, tmp_path: Path):
    make_model("opt", seed=1).save_pretrained(tmp_path)
    prints = {make_engine(p).info.fingerprint for p in (checkpoint("opt"), tmp_path)}
    assert len(prints) == 2
    assert make_engine(tmp_path).info.fingerprint in prints


def test_calibration_gives_usable_coefficients(checkpoint: Checkpoints):
    e = make_engine(checkpoint("opt"), calibrate=True)
    c = e.info.calibration
    values = [
        *(c.base_seconds, c.seconds_per_token, c.seconds_per_sequence),
        *(c.seconds_per_attention_pair, *(t.seconds_per_cached_token for t in e.info.tiers)),
    ]
    assert all(v >= 0.0 for v in values)
    assert 0.0 < c.base_seconds + c.seconds_per_sequence + c.seconds_per_token < 1.0
    assert e.allocator.num_free == e.info.num_units


@pytest.mark.parametrize(
    ("name", "rank", "index"), [("cuda", 0, 0), ("cuda", 1, 1), ("cuda:1", 0, 1)]
)
def test_kernels_are_launched_where_the_model_is(
    name: str, rank: int, index: int, monkeypatch: pytest.MonkeyPatch
):
    """Triton launches on the current device of the thread, wherever its tensors are."""
    current: list[torch.device] = []

    def load(*_: object, device: torch.device, **__: object) -> None:
        assert current == [device]
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(engine_module, "load_model", load)
    with pytest.raises(InterruptedError):
        load_engine(WorkerSettings(device=name), RankGroup(rank, 2))
    assert current == [torch.device("cuda", index)]


def test_first_steps_take_nothing_of_the_time_for_calibration(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
):
    """A GPU compiles in the first steps of each kind, which takes longer than all the others."""
    now, seen = [0.0], set[tuple[Tier, str]]()
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: now[0])
    engine = make_engine(checkpoint("opt"))
    execute, tiers = engine.execute, dict[int, Tier]()

    def slow_at_first(plan: BatchPlan) -> StepOutput:
        tiers.update({new.sequence_id: new.tier for new in plan.new})
        entry = plan.scheduled[0]
        kind = tiers[entry.sequence_id], "promotion" if plan.promote else _kind_of(entry)
        now[0] += 1e-3 if kind in seen else 60.0
        seen.add(kind)
        return execute(plan)

    monkeypatch.setattr(engine, "execute", slow_at_first)
    engine.measure(engine)
    kinds = {"prompt", "chunk", "decode"}
    assert seen == {(t.tier, k) for t in engine.info.tiers for k in kinds} | {
        (Tier.HIDDEN, "promotion")
    }
    c = engine.info.calibration
    assert c.base_seconds + c.seconds_per_sequence + c.seconds_per_token == pytest.approx(1e-3)


def _kind_of(entry: ScheduledSequence) -> str:
    if entry.num_computed_tokens == 0:
        return "prompt"
    return "decode" if entry.num_new_tokens == 1 else "chunk"


def test_an_id_and_row_used_again_start_without_a_history(opt: ModelEngine):
    """A scheduler that reattaches counts its sequences from 1 again."""
    wishes = Sampling(max_tokens=8, seed=0, frequency_penalty=2.0, repetition_penalty=2.0)

    def run() -> list[int]:
        opt.reset()
        new, tokens = NewSequence(1, "r", [5, 6, 7], 3, Tier.KV, wishes), [5, 6, 7]
        for step in range(6):
            done, count = (0, 3) if step == 0 else (len(tokens) - 1, 1)
            plan = BatchPlan(
                step,
                new=[new] if step == 0 else (),
                scheduled=[ScheduledSequence(1, done, count)],
            )
            tokens += opt.execute(plan).outputs[0].token_ids
        return tokens

    assert run() == run()


@pytest.mark.parametrize("graphs", ["off", "eager"])
def test_a_second_engine_on_a_model_frees_the_first_ones_pool(graphs: str, checkpoint: Checkpoints):
    settings = WorkerSettings(**engine_settings(checkpoint("opt"), graphs=graphs, max_num_seqs=2))
    loaded = load_model(
        str(checkpoint("opt")), name=None, device=torch.device("cpu"), dtype=torch.float32
    )
    first = ModelEngine(loaded, settings)
    pool = weakref.ref(first._runner.pool.layers[0])
    del first
    ModelEngine(loaded, settings)
    gc.collect()
    assert pool() is None
