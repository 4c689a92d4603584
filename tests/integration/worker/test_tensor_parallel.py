"""Several ranks, each a process: the tokens of one, from a part of its memory each."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aptserve_worker.config import SettingsError, WorkerSettings, load_settings
from aptserve_worker.model.probe import UnsupportedModelError
from aptserve_worker.parallel.engine import ParallelEngine
from aptserve_worker.plan import BatchPlan, Engine, PlanError, ScheduledSequence, Tier
from support.ahead import RandomPlanner, assert_same, plan_and_run_ahead, run_one_by_one
from support.engines import Driver, engine_settings, make_engine
from support.models import VOCAB, greedy, make_model, save_model

WIDE = {"hidden_size": 64, "num_hidden_layers": 2}
"""Heads of 16 elements, the least that Triton kernels take."""


@contextmanager
def ranks(model: Path, size: int = 2, **changes: Any) -> Iterator[ParallelEngine]:
    """An engine over ``size`` ranks that must all live to its end."""
    lost: list[str] = []
    settings = engine_settings(model, tensor_parallel=size, **changes)
    engine = ParallelEngine(WorkerSettings(**settings), on_lost=lost.append)
    try:
        yield engine
        engine.reset()
    finally:
        engine.close()
    assert not lost


def prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, VOCAB) for _ in range(length)] for length in lengths]


def play(
    engine: Engine, lengths: tuple[int, ...] = (1, 5, 17, 30)
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts in pieces, every tier, promotion, recomputation; prompts and greedy answers.

    Among them are sequences that sample, whose tokens are in the answers but not in the prompts.
    """
    driver = Driver(engine)
    tiers = [t.tier for t in engine.info.tiers if t.exact]
    batch = prompts(lengths)
    ids = [driver.add(p, tier=t, max_tokens=6, ignore_eos=True) for p in batch for t in tiers]
    sampled = [
        driver.add(batch[-1], tier=tiers[-1], max_tokens=6, temperature=0.9, seed=5),
        driver.add(
            batch[0], tier=tiers[-1], max_tokens=6, repetition_penalty=1.4, frequency_penalty=0.3
        ),
    ]
    longest = ids[-len(tiers) :]
    driver.step({ids[0]: 1, **dict.fromkeys(longest, 11)})
    driver.step(dict.fromkeys(longest, 2))
    driver.step()
    if Tier.HIDDEN in tiers:
        driver.step(promote=[ids[1]])
    longest_text = driver.tokens[ids[-1]]
    again = driver.add(
        longest_text, num_prompt_tokens=lengths[-1], tier=tiers[-1], max_tokens=6, ignore_eos=True
    )
    driver.run()
    assert driver.output(again) == driver.output(ids[-1])
    answers = [driver.output(i) for i in (*ids, *sampled)]
    engine.release([*ids, *sampled, again])
    return [p for p in batch for _ in tiers], answers


@pytest.mark.parametrize(
    ("name", "tiers"),
    [
        ("opt", [Tier.KV, Tier.HIDDEN]),  # a plan from its structure; states absorbed
        ("llama", [Tier.KV, Tier.HIDDEN]),  # transformers' plan; keys projected and rotated
        ("gpt-neox", [Tier.KV, Tier.HIDDEN]),  # queries, keys and values in one weight
        ("qwen3-multi-head", [Tier.KV, Tier.HIDDEN]),  # a norm on keys
        ("llama-grouped", [Tier.KV]),
        ("phi3", [Tier.KV]),  # a plan that leaves attention whole
        ("qwen3-moe", [Tier.KV]),
    ],
)
def test_two_ranks_give_the_tokens_of_one(name: str, tiers: list[Tier], tmp_path: Path):
    path, oracle = save_model(tmp_path, name), make_model(name)
    batch, alone = play(make_engine(path))
    for prompt, answer in zip(batch, alone, strict=False):
        wanted = greedy(oracle, prompt, 6)  # up to the end-of-sequence token, if there is one
        assert answer[: len(wanted)] == wanted
    with ranks(path) as engine:
        assert [t.tier for t in engine.info.tiers] == tiers
        assert engine.info.fingerprint == make_engine(path).info.fingerprint
        _, answers = play(engine)
    if tiers == [t.tier for t in make_engine(path).info.tiers]:
        assert answers == alone


def test_four_ranks(tmp_path: Path):
    path = save_model(tmp_path, "llama")
    _, alone = play(make_engine(path))
    with ranks(path, 4) as engine:
        assert engine.info.device == "4 x cpu"
        assert play(engine)[1] == alone


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_padded_steps_on_triton_kernels(name: str, tmp_path: Path):
    changes = {**WIDE, **({"word_embed_proj_dim": 64} if name == "opt" else {})}
    path = save_model(tmp_path, name, **changes)
    settings = {"kernels": "triton", "graphs": "eager", "block_size": 16, "max_num_seqs": 8}
    _, alone = play(make_engine(path), (1, 17))
    with ranks(path, **settings, pool_units=100) as engine:
        assert play(engine, (1, 17))[1] == alone


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_random_plans_launched_ahead(name: str, tmp_path: Path):
    """Chunks, promotions, releases, ends that the next step does not know of."""
    path = save_model(tmp_path, name)
    with ranks(path, max_num_seqs=6, overlap="on") as engine:
        planner = RandomPlanner(3, [t.tier for t in engine.info.tiers], max_num_seqs=6)
        work, outputs = plan_and_run_ahead(engine, planner, num_steps=80)
    assert any(output.skipped for output in outputs)
    assert_same(outputs, run_one_by_one(make_engine(path, max_num_seqs=6), work))


def test_8_bit_codes(tmp_path: Path):
    path = save_model(tmp_path, "llama-grouped")

    def answer(engine: Engine) -> list[int]:
        driver = Driver(engine)
        sequence = driver.add(prompts((20,))[0], tier=Tier.KV8, max_tokens=10)
        driver.run()
        return driver.output(sequence)

    alone = answer(make_engine(path, tiers="kv,kv8"))
    with ranks(path, tiers="kv,kv8") as engine:
        assert answer(engine) == alone


@pytest.mark.parametrize("name", ["opt", "llama-grouped"])
def test_every_tier_holds_more_the_more_ranks_there_are(name: str, tmp_path: Path):
    """Twice the tokens in the same memory of each rank, hidden states included."""
    path = save_model(tmp_path, name)
    memory = {"pool_units": None, "pool_memory": 1_000_000}
    alone = make_engine(path, **memory).info
    with ranks(path, **memory) as engine:
        assert engine.info.num_units in (2 * alone.num_units, 2 * alone.num_units + 1)
        assert engine.info.unit_bytes == alone.unit_bytes  # of all ranks together
        assert [t.units_per_block for t in engine.info.tiers] == [
            t.units_per_block for t in alone.tiers
        ]


def test_a_wrong_plan_is_refused_and_disturbs_nothing(tmp_path: Path):
    path = save_model(tmp_path, "opt")
    with ranks(path) as engine:
        driver = Driver(engine)
        sequence = driver.add([3, 4, 5], tier=Tier.HIDDEN, max_tokens=6)
        driver.step()
        with pytest.raises(PlanError, match="scheduled but unknown"):
            engine.execute(BatchPlan(99, scheduled=[ScheduledSequence(10**6, 0, 1)]))
        driver.run()
        assert driver.output(sequence) == greedy(make_model("opt"), [3, 4, 5], 6)


def test_calibration_covers_all_ranks(tmp_path: Path):
    with ranks(save_model(tmp_path, "opt"), calibrate=True) as engine:
        assert engine.info.calibration.base_seconds > 0


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("gpt2", 2, "transformers has no tensor-parallel plan for GPT2LMHeadModel"),
        ("llama-grouped", 4, "does not divide the model's 4 attention heads and 2 key heads"),
    ],
)
def test_refused_in_one_sentence(name: str, size: int, message: str, tmp_path: Path):
    with (
        pytest.raises(UnsupportedModelError, match=message),
        ranks(save_model(tmp_path, name), size),
    ):
        pass


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"tensor_parallel": 0}, "tensor_parallel=0"),
        ({"tensor_parallel": 2, "device": "cuda:1"}, "device=cuda:1"),
        ({"tensor_parallel": 2, "model": "fake"}, "tensor_parallel=2"),
    ],
)
def test_wrong_settings_name_the_field(values: dict[str, Any], field: str):
    with pytest.raises(SettingsError, match=field):
        load_settings(**values)
