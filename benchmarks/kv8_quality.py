"""What the 8-bit tier costs in quality, on the embedded model and text that it was not trained on.

Perplexity is of text fed in chunks, each of which attends to what the chunks before it left in the
cache. Agreement is of greedy continuations with those of the exact tier, up to the first token that
differs: what follows is another text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from aptserve_worker.config import WorkerSettings
from aptserve_worker.embedded import train
from aptserve_worker.engine import ModelEngine, build_engine
from aptserve_worker.model.step import Part, build_step
from aptserve_worker.plan import BatchPlan, NewSequence, Sampling, ScheduledSequence, Tier
from aptserve_worker.sequences import Sequence
from tokenizers import Tokenizer

from benchmarks.common import describe_machine

NUM_TEXTS, TEXT_TOKENS, CHUNK = 64, 512, 16
NUM_PROMPTS, PROMPT_TOKENS, OUTPUT_TOKENS = 64, 64, 64
FORMATS = ("int8", "fp8")


def measure() -> dict[str, Any]:
    """Perplexity and greedy agreement of each format, against keys and values as they are."""
    torch.set_num_threads(2)
    results: dict[str, Any] = {}
    exact: list[list[int]] = []
    for name, tier in (("kv", Tier.KV), *((code, Tier.KV8) for code in FORMATS)):
        code = name if tier is Tier.KV8 else "int8"
        engine = _engine(tiers=(Tier.KV, Tier.KV8), kv8_format=code)
        texts = _texts(engine, NUM_TEXTS, TEXT_TOKENS)
        outputs = _continuations(engine, tier, [text[:PROMPT_TOKENS] for text in texts])
        exact = exact or outputs
        results[name] = {
            "perplexity": math.exp(_loss(engine, tier, texts)),
            **_agreement(outputs, exact),
        }
    return {
        "machine": describe_machine(),
        "text": f"{NUM_TEXTS} x {TEXT_TOKENS} tokens of held-out files, in chunks of {CHUNK}",
        "continuations": f"{NUM_PROMPTS} of {OUTPUT_TOKENS} tokens after {PROMPT_TOKENS}",
        "kv8_quality": results,
    }


def _engine(**settings: Any) -> ModelEngine:
    return build_engine(WorkerSettings(calibrate=False, max_num_seqs=NUM_PROMPTS, **settings))


def _texts(engine: ModelEngine, count: int, length: int) -> list[list[int]]:
    """Pieces of files that were held out of the training."""
    tokenizer = Tokenizer.from_str(engine.info.tokenizer_json.decode())
    _, held_out = train.split_files(train.STANDARD_LIBRARY, seed=0)
    pieces: list[list[int]] = []
    for path in held_out:
        ids = tokenizer.encode(train.decode_source(path.read_bytes())).ids
        pieces += [ids[i : i + length] for i in range(0, len(ids) - length, length)]
    step = max(1, len(pieces) // count)
    return pieces[::step][:count]


def _loss(engine: ModelEngine, tier: Tier, texts: list[list[int]]) -> float:
    """Mean negative log-likelihood in nats of the tokens after the first chunk."""
    total = num = 0.0
    for ids in texts:
        for logits, targets in _chunks(engine, tier, ids):
            total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            num += len(targets)
    return total / num


def _chunks(
    engine: ModelEngine, tier: Tier, ids: list[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of each chunk but the first, over the cache that those before it left."""
    runner, tables, allocator = engine._runner, engine._tables, engine.allocator
    row = tables.take_row()
    assert row is not None
    new = NewSequence(0, "", ids, len(ids), tier, Sampling(1, 0))
    sequence = Sequence.of(new, row, engine.info.context_length)
    units = allocator.allocate(runner.shard.num_blocks(len(ids)) * runner.units_per_block[tier])
    assert units is not None
    tables.extend(tier, row, 0, units)
    for start in range(0, len(ids), CHUNK):
        count = min(CHUNK, len(ids) - start)
        parts, none = [Part(sequence, count)], torch.zeros(0, dtype=torch.int64)
        step = build_step(parts, tables, runner.shard, runner.device, none)
        rows = torch.arange(count)
        logits = runner.forward(step.token_ids, step.positions, step.attention, rows)
        sequence.num_computed += count
        targets = torch.tensor(ids[start + 1 : start + count + 1])
        if start:
            yield logits[: len(targets)], targets
    allocator.free(units)
    tables.give_row(row)


def _continuations(engine: ModelEngine, tier: Tier, prompts: list[list[int]]) -> list[list[int]]:
    wishes = Sampling(max_tokens=OUTPUT_TOKENS, seed=0, ignore_eos=True)
    new = [
        NewSequence(i, "", prompt, len(prompt), tier, wishes)
        for i, prompt in enumerate(prompts, start=1)
    ]
    outputs: list[list[int]] = [[] for _ in prompts]
    computed = 0
    for step in range(OUTPUT_TOKENS):
        count = PROMPT_TOKENS if step == 0 else 1
        scheduled = [ScheduledSequence(s.sequence_id, computed, count) for s in new]
        plan = BatchPlan(step + 1, new=new if step == 0 else (), scheduled=scheduled)
        computed += count
        for output in engine.execute(plan).outputs:
            outputs[output.sequence_id - 1] += output.token_ids
    engine.release([s.sequence_id for s in new])
    return outputs


def _agreement(outputs: list[list[int]], exact: list[list[int]]) -> dict[str, float]:
    """Shares of continuations that are equal throughout, and of tokens before a difference."""
    equal = []
    for output, wanted in zip(outputs, exact, strict=True):
        different = [i for i, (a, b) in enumerate(zip(output, wanted, strict=True)) if a != b]
        equal.append(different[0] if different else len(wanted))
    # One decision was different in each that is not equal throughout.
    num_decisions = sum(min(count + 1, OUTPUT_TOKENS) for count in equal)
    return {
        "equal_continuations": sum(n == OUTPUT_TOKENS for n in equal) / len(equal),
        "equal_decisions": sum(equal) / num_decisions,
    }
