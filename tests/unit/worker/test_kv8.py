"""The 8-bit tier: on request, close to the exact tiers, and the same however it is cut up."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from aptserve_worker.plan import Tier
from support.engines import Driver, make_engine
from support.models import VOCAB, greedy, make_model

Checkpoint = Callable[[str], Path]
NAMES = ["opt", "llama-grouped", "gemma2", "mistral-window", "qwen3"]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB) for _ in range(rng.randint(8, 40))] for _ in range(count)]


def test_it_is_offered_only_on_request(checkpoint: Checkpoint) -> None:
    assert Tier.KV8 not in [t.tier for t in make_engine(checkpoint("opt")).info.tiers]
    tiers = make_engine(checkpoint("opt"), tiers="kv,hidden,kv8").info.tiers
    assert [(t.tier, t.units_per_block, t.exact) for t in tiers] == [
        (Tier.KV, 2, True),
        (Tier.HIDDEN, 1, True),
        (Tier.KV8, 1, False),
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("code", ["int8", "fp8"])
def test_most_tokens_are_those_of_the_exact_tiers(
    name: str, code: str, checkpoint: Checkpoint
) -> None:
    driver = Driver(make_engine(checkpoint(name), tiers="kv,kv8", kv8_format=code))
    batch = prompts(12)
    ids = [driver.add(prompt, tier=Tier.KV8, max_tokens=6) for prompt in batch]
    driver.run()
    oracle = make_model(name)
    exact = [greedy(oracle, prompt, 6) for prompt in batch]
    # Until the first difference: afterwards two texts have nothing to do with each other.
    agreed = total = 0
    for sequence, wanted in zip(ids, exact, strict=True):
        for got, token in zip(driver.output(sequence), wanted, strict=True):
            total += 1
            agreed += got == token
            if got != token:
                break
    assert agreed / total > (0.9 if code == "int8" else 0.8)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_changes_nothing(name: str, checkpoint: Checkpoint) -> None:
    engine = make_engine(checkpoint(name), tiers="kv,kv8")
    batch = prompts(5, seed=3)
    driver = Driver(engine)
    together = [
        driver.add(p, tier=(Tier.KV8, Tier.KV)[i == 2], max_tokens=5) for i, p in enumerate(batch)
    ]
    driver.run()
    for i, prompt in enumerate(batch):
        alone = driver.add(prompt, tier=(Tier.KV8, Tier.KV)[i == 2], max_tokens=5)
        driver.run()
        assert driver.output(alone) == driver.output(together[i])


def test_chunks_see_the_codes_of_what_came_before(checkpoint: Checkpoint) -> None:
    """Logits of a prompt in chunks are close to those of the prompt at once, and not equal."""
    engine = make_engine(checkpoint("opt"), tiers="kv,kv8")
    prompt = (prompts(1, seed=9)[0] * 6)[:50]
    tops = []
    for chunk in (len(prompt), 5):
        driver = Driver(engine)
        sequence = driver.add(prompt, tier=Tier.KV8, max_tokens=1, num_logprobs=0)
        for start in range(0, len(prompt), chunk):
            driver.step({sequence: min(chunk, len(prompt) - start)})
        tops.append(driver.logprobs[sequence][0].chosen)
    assert tops[0][0] == tops[1][0]
    assert tops[0][1] == pytest.approx(tops[1][1], abs=0.1)
    assert tops[0][1] != tops[1][1]


def test_memory_of_the_scales_is_counted(checkpoint: Checkpoint) -> None:
    plain, coded = (make_engine(checkpoint("opt"), tiers=t) for t in ("kv", "kv,kv8"))
    layers, heads, block_size = 3, 4, 4
    assert coded.info.unit_bytes - plain.info.unit_bytes == layers * 2 * heads * block_size * 2
    assert torch.finfo(torch.float16).bits == 16
