"""Greedy tokens equal transformers' ``generate()``, however the cache is held and cut up."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from aptserve_worker.engine import ModelEngine
from aptserve_worker.plan import Tier
from support.engines import Driver
from support.models import ARCHITECTURES, CONTEXT, VOCAB, greedy
from transformers import PreTrainedModel

Engines = Callable[[str], ModelEngine]
Oracles = Callable[[str], PreTrainedModel]

HIDDEN_FOLDED = {"opt", "opt-post-norm", "gpt2"}
HIDDEN_PROJECTED = {
    *("llama", "qwen2-multi-head", "qwen3-multi-head", "gpt-neox", "phi", "gemma-wide-heads")
}
HIDDEN = sorted(HIDDEN_FOLDED | HIDDEN_PROJECTED)


def prompts(count: int, longest: int = 40, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(count)]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_offered_tiers(name: str, engine: Engines):
    offered = [t.tier for t in engine(name).info.tiers]
    assert offered == ([Tier.KV, Tier.HIDDEN] if name in HIDDEN else [Tier.KV])


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@pytest.mark.parametrize("tier", [Tier.KV, Tier.HIDDEN])
def test_each_tier_alone(name: str, tier: Tier, engine: Engines, oracle: Oracles):
    if tier is Tier.HIDDEN and name not in HIDDEN:
        return
    driver = Driver(engine(name))
    batch = [[5], [3, 4], *prompts(4), list(range(3, 3 + CONTEXT)), [7] * (CONTEXT - 5)]
    ids = [driver.add(p, tier=tier, max_tokens=min(12, CONTEXT - len(p) + 1)) for p in batch]
    driver.run()
    for sequence, prompt in zip(ids, batch, strict=True):
        room = min(12, CONTEXT - len(prompt) + 1)  # the last token is not fed again
        assert driver.output(sequence) == greedy(oracle(name), prompt, room)
    driver.engine.release(ids)


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("count", [2, 7, 32])
def test_tiers_mixed_in_one_batch(name: str, count: int, engine: Engines, oracle: Oracles):
    driver = Driver(engine(name))
    batch = prompts(count, longest=20, seed=count)
    ids = []
    for i, prompt in enumerate(batch):  # join one after the other: prefills among decodes
        ids.append(driver.add(prompt, tier=(Tier.KV, Tier.HIDDEN)[i % 2], max_tokens=8))
        if i % 3 == 0:
            driver.step()
    driver.run()
    for sequence, prompt in zip(ids, batch, strict=True):
        assert driver.output(sequence) == greedy(oracle(name), prompt, 8)
    driver.engine.release(ids)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_prefill_in_chunks(name: str, chunk: int, engine: Engines, oracle: Oracles):
    tiers = [t.tier for t in engine(name).info.tiers]
    driver = Driver(engine(name))
    batch = prompts(4, longest=30, seed=chunk)
    ids = [driver.add(p, tier=tiers[i % len(tiers)], max_tokens=6) for i, p in enumerate(batch)]
    while not all(s in driver.finished for s in ids):
        driver.step(
            {
                s: min(chunk, len(driver.tokens[s]) - driver.computed[s])
                for s in ids
                if s not in driver.finished
            }
        )
    for sequence, prompt in zip(ids, batch, strict=True):
        assert driver.output(sequence) == greedy(oracle(name), prompt, 6)
    driver.engine.release(ids)


@pytest.mark.parametrize("name", HIDDEN)
def test_promotion_in_place(name: str, engine: Engines, oracle: Oracles):
    driver = Driver(engine(name))
    batch = prompts(5, longest=30, seed=4)
    ids = [driver.add(p, tier=Tier.HIDDEN, max_tokens=10) for p in batch]
    driver.step()
    driver.step()
    free = driver.engine.allocator.num_free
    driver.step(promote=ids[:2])
    assert driver.engine.allocator.num_free < free
    driver.run()
    for sequence, prompt in zip(ids, batch, strict=True):
        assert driver.output(sequence) == greedy(oracle(name), prompt, 10)
    driver.engine.release(ids)


@pytest.mark.parametrize("name", ["opt", "llama", "llama-grouped", "mistral-window"])
def test_preempted_and_computed_again(name: str, engine: Engines, oracle: Oracles):
    tiers = [t.tier for t in engine(name).info.tiers]
    driver = Driver(engine(name))
    prompt = prompts(1, seed=9)[0]
    first = driver.add(prompt, tier=tiers[0], max_tokens=14)
    other = driver.add(prompt[:3], tier=tiers[-1], max_tokens=14)
    for _ in range(4):
        driver.step()
    known = driver.tokens.pop(first)
    again = driver.add(known, tier=tiers[-1], num_prompt_tokens=len(prompt), max_tokens=14)
    driver.step(release=[first])
    driver.run()
    assert driver.output(again) == greedy(oracle(name), prompt, 14)
    assert driver.output(other) == greedy(oracle(name), prompt[:3], 14)
    driver.engine.release([again, other])
