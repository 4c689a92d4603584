"""The worker on Triton kernels, under their interpreter: the same tokens as ``generate()``."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aptserve_worker.engine import ModelEngine
from aptserve_worker.model.probe import UnsupportedModelError
from aptserve_worker.plan import Tier
from support.engines import Driver, make_engine
from support.models import VOCAB, greedy, make_model, save_model
from transformers import PreTrainedModel

# Heads of at least 16 elements, which is what the kernels take.
WIDE: dict[str, dict[str, Any]] = {
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "num_hidden_layers": 2},
    "llama": {"hidden_size": 64, "num_hidden_layers": 2},
    "llama-grouped": {"hidden_size": 64, "num_hidden_layers": 2},
    "gemma2": {"hidden_size": 64, "head_dim": 16, "num_hidden_layers": 2},
    "qwen3-multi-head": {"hidden_size": 64, "head_dim": 16, "num_hidden_layers": 2},
    "mistral-window": {"hidden_size": 64, "num_hidden_layers": 2},
}
Made = Callable[..., tuple[ModelEngine, PreTrainedModel]]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    def make(name: str, **settings: Any) -> tuple[ModelEngine, PreTrainedModel]:
        path = save_model(tmp_path, name, **WIDE[name])
        values = {"kernels": "triton", "block_size": 16, "pool_units": 60, **settings}
        return make_engine(path, **values), make_model(name, **WIDE[name])

    return make


def prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, VOCAB) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("name", sorted(WIDE))
def test_every_tier_chunk_and_promotion(name: str, made: Made) -> None:
    engine, oracle = made(name)
    driver = Driver(engine)
    tiers = [t.tier for t in engine.info.tiers]
    batch = prompts((1, 17, 30))
    ids = [
        driver.add(prompt, tier=tiers[(i + 1) % len(tiers)], max_tokens=4)
        for i, prompt in enumerate(batch)
    ]
    driver.step()
    if Tier.HIDDEN in tiers:
        driver.step(promote=[ids[0]])
    batch.append(batch[2] + batch[1])
    late = driver.add(batch[3], tier=tiers[-1], max_tokens=3)
    driver.step({late: 10, ids[1]: 1})
    driver.step({late: 7})
    driver.run()
    for sequence, prompt, count in zip([*ids, late], batch, (4, 4, 4, 3), strict=True):
        assert driver.output(sequence) == greedy(oracle, prompt, count)


def test_padded_steps(made: Made) -> None:
    engine, oracle = made("opt", graphs="eager", max_num_seqs=3)
    driver = Driver(engine)
    batch = prompts((3, 18, 16))
    ids = [
        driver.add(p, tier=(Tier.KV, Tier.HIDDEN)[i % 2], max_tokens=4) for i, p in enumerate(batch)
    ]
    driver.run()
    for sequence, prompt in zip(ids, batch, strict=True):
        assert driver.output(sequence) == greedy(oracle, prompt, 4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_8_bit_codes_beside_keys_and_values(dtype: str, made: Made) -> None:
    """The reference says what codes give; both forms see the same ones."""
    outputs = []
    for kernels in ("triton", "reference"):
        if kernels == "triton" and dtype == "bfloat16":
            continue  # products of that dtype are wrong in the interpreter
        engine, _ = made("llama-grouped", kernels=kernels, dtype=dtype, tiers="kv,kv8")
        driver = Driver(engine)
        batch = prompts((20, 9, 33))
        ids = [
            driver.add(p, tier=(Tier.KV8, Tier.KV)[i % 2], max_tokens=4)
            for i, p in enumerate(batch)
        ]
        driver.step({ids[2]: 15, ids[0]: 20, ids[1]: 9})
        driver.run()
        outputs.append([driver.output(sequence) for sequence in ids])
    assert all(output == outputs[0] for output in outputs)


def test_a_size_that_is_not_compiled_is_named(made: Made) -> None:
    with pytest.raises(UnsupportedModelError, match="a block size of 12"):
        made("llama", block_size=12)


def test_without_a_gpu_and_the_interpreter_it_says_so(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UnsupportedModelError, match="--kernels triton needs a GPU"):
        made("llama")
