"""Decode steps padded to fixed shapes, run without recording: the same tokens as ``generate()``."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aptserve_worker.engine import ModelEngine
from aptserve_worker.model.graphs import DecodeGraphs
from aptserve_worker.plan import Tier
from support.engines import Driver, make_engine
from support.models import VOCAB, greedy
from transformers import PreTrainedModel

Checkpoint = Callable[[str], Path]
Oracles = Callable[[str], PreTrainedModel]


def make(checkpoint: Checkpoint, name: str, **changes: Any) -> ModelEngine:
    return make_engine(checkpoint(name), **{"graphs": "eager", "max_num_seqs": 12, **changes})


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 20))] for _ in range(count)]


class Spy:
    """Counts steps that a recorded one served."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        run = DecodeGraphs.run

        def watched(graphs: DecodeGraphs, parts: Any) -> Any:
            result = run(graphs, parts)
            if result is not None:
                self.rows.append(len(parts))
            return result

        monkeypatch.setattr(DecodeGraphs, "run", watched)


@pytest.mark.parametrize("name", ["opt", "llama", "llama-grouped", "gemma2", "mistral-window"])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_tokens_are_those_of_generate(
    name: str,
    kernels: str,
    checkpoint: Checkpoint,
    oracle: Oracles,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make(checkpoint, name, kernels=kernels)
    spy = Spy(monkeypatch)
    driver = Driver(engine)
    tiers = [t.tier for t in engine.info.tiers]
    ids, batch = [], prompts(7)
    for i, prompt in enumerate(batch):  # join one after the other: other numbers of rows each time
        ids.append(driver.add(prompt, tier=tiers[i % len(tiers)], max_tokens=3 + i))
        driver.step()
        driver.step()
    if Tier.HIDDEN in tiers:
        driver.step(promote=[s for s in ids[1::2] if s not in driver.finished][:1])
    driver.run()
    for i, (sequence, prompt) in enumerate(zip(ids, batch, strict=True)):
        assert driver.output(sequence) == greedy(oracle(name), prompt, 3 + i)
    assert len(set(spy.rows)) > 2
    driver.engine.release(ids)


def test_a_row_that_changes_hands_leaves_nothing_behind(
    checkpoint: Checkpoint, oracle: Oracles
) -> None:
    engine = make(checkpoint, "opt", max_num_seqs=2, pool_units=40)
    for round_, prompt in enumerate(prompts(6)):
        driver = Driver(engine)
        tier = (Tier.KV, Tier.HIDDEN)[round_ % 2]
        sequence = driver.add(prompt, tier=tier, max_tokens=5)
        driver.run()
        assert driver.output(sequence) == greedy(oracle("opt"), prompt, 5)
        engine.release([sequence])
    assert engine.allocator.num_free == engine.allocator.num_units


def test_prompts_and_chunks_go_their_own_way(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(checkpoint, "opt")
    spy = Spy(monkeypatch)
    driver = Driver(engine)
    sequence = driver.add([5, 6, 7, 8], max_tokens=3)
    driver.step({sequence: 2})
    driver.step({sequence: 1})  # one token, but not the last one known
    driver.step({sequence: 1})
    assert spy.rows == [1]


def test_more_tiers_than_a_recorded_step_has(checkpoint: Checkpoint) -> None:
    engine = make(checkpoint, "opt", tiers="kv,hidden,kv8")
    driver = Driver(engine)
    ids = [driver.add([5, 6, 7], tier=tier, max_tokens=3) for tier in Tier]
    driver.run()
    assert [len(driver.output(sequence)) for sequence in ids] == [3, 3, 3]
