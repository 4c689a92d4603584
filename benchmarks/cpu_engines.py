"""Decode steps and offline throughput of one model shape, beside other engines, in one run.

The model has the shape of OPT-125m with random float32 weights. Every engine gets the same prompts,
two threads and greedy sampling without an end-of-sequence token, and is called in turn, round after
round, so that the machine's moods hit all alike.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import describe_machine, make_prompts, save_opt_125m, spread

PROMPT_TOKENS = 128
DECODE_STEPS = 32
BATCHES = (1, 8, 32)
OFFLINE = (32, 128, 64)
"""Requests, prompt tokens, new tokens."""

Generate = Callable[[Sequence[list[int]], int], list[list[int]]]
"""(prompts, new tokens) → answers."""


def ours(model: Path, tier: str) -> Generate:
    """Our worker's engine in this process, driven by a plain loop."""
    from aptserve_worker.config import WorkerSettings
    from aptserve_worker.engine import build_engine
    from aptserve_worker.plan import BatchPlan, NewSequence, Sampling, ScheduledSequence, Tier

    engine = build_engine(
        WorkerSettings(
            model=str(model), calibrate=False, pool_units=2000, max_num_seqs=64, num_threads=2
        )
    )
    kind = Tier[tier]

    def generate(prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
        sampling = Sampling(max_tokens=new_tokens, seed=0, ignore_eos=True)
        new = [NewSequence(i, str(i), p, len(p), kind, sampling) for i, p in enumerate(prompts)]
        parts = [ScheduledSequence(i, 0, len(p)) for i, p in enumerate(prompts)]
        answers: list[list[int]] = [[] for _ in prompts]
        for step in range(new_tokens):
            result = engine.execute(BatchPlan(step, new=new, scheduled=parts))
            for output in result.outputs:
                answers[output.sequence_id] += output.token_ids
            new = []
            parts = [ScheduledSequence(i, len(p) + step, 1) for i, p in enumerate(prompts)]
        engine.reset()
        return answers

    return generate


def with_transformers(model: Path) -> Generate:
    """``generate`` with a static batch."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    @torch.inference_mode()
    def generate(prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        out = lm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=1,
        )
        answers: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return answers

    return generate


def with_ctranslate2(model: Path, folder: Path) -> Generate:
    """CTranslate2's generator in float32."""
    import ctranslate2

    converted = folder / "ctranslate2"
    if not converted.exists():
        ctranslate2.converters.TransformersConverter(str(model)).convert(str(converted))
    generator = ctranslate2.Generator(
        str(converted), device="cpu", intra_threads=2, inter_threads=1, compute_type="float32"
    )

    def generate(prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
        results = generator.generate_batch(
            [[f"t{t}" for t in p] for p in prompts],
            max_length=new_tokens,
            min_length=new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return [list(r.sequences_ids[0]) for r in results]

    return generate


def measure(folder: Path, rounds: int = 3) -> dict[str, Any]:
    """Run every engine ``rounds`` times; times in milliseconds, throughput in output tokens/s."""
    torch.set_num_threads(2)
    model = save_opt_125m(folder)
    engines: dict[str, Generate] = {
        "apt-serve (kv)": ours(model, "KV"),
        "apt-serve (hidden)": ours(model, "HIDDEN"),
        "transformers": with_transformers(model),
        "ctranslate2": with_ctranslate2(model, folder),
    }
    agreement = _check(engines)
    steps: dict[str, dict[int, list[float]]] = {e: {b: [] for b in BATCHES} for e in engines}
    offline: dict[str, list[float]] = {e: [] for e in engines}
    requests, prompt_tokens, new_tokens = OFFLINE
    for _ in range(rounds):
        for name, generate in engines.items():
            for batch in BATCHES:
                prompts = make_prompts(batch, PROMPT_TOKENS)
                prefill = _seconds(generate, prompts, 1)
                whole = _seconds(generate, prompts, 1 + DECODE_STEPS)
                steps[name][batch].append((whole - prefill) / DECODE_STEPS * 1e3)
            seconds = _seconds(generate, make_prompts(requests, prompt_tokens), new_tokens)
            offline[name].append(requests * new_tokens / seconds)
    return {
        "machine": describe_machine(),
        "model": "OPT-125m shape, random float32 weights",
        "prompt_tokens": PROMPT_TOKENS,
        "decode_steps": DECODE_STEPS,
        "rounds": rounds,
        "equal_answers": agreement,
        "decode_step_ms": {
            e: {str(b): spread(v) for b, v in by.items()} for e, by in steps.items()
        },
        "offline_tokens_per_second": {e: spread(v) for e, v in offline.items()},
    }


def _seconds(generate: Generate, prompts: Sequence[list[int]], new_tokens: int) -> float:
    started = time.perf_counter()
    answers = generate(prompts, new_tokens)
    seconds = time.perf_counter() - started
    assert all(len(a) == new_tokens for a in answers), "an engine stopped early"
    return seconds


def _check(engines: dict[str, Generate]) -> dict[str, str]:
    """Share of answers equal to transformers'; ours must all be, or nothing is measured."""
    prompts = make_prompts(8, 32)
    wanted = engines["transformers"](prompts, 16)
    shares = {}
    for name, generate in engines.items():
        equal = sum(a == b for a, b in zip(generate(prompts, 16), wanted, strict=True))
        shares[name] = f"{equal}/{len(prompts)}"
        if name.startswith("apt-serve") and equal != len(prompts):
            raise SystemExit(f"{name} disagrees with transformers: {shares[name]} answers equal")
    return shares


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), arguments.rounds)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
