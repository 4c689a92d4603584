"""The same model under transformers' own ``generate``: a static batch, and continuous batching."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from aptserve_worker.model.loading import LoadedModel
from transformers import GenerationConfig

from benchmarks.gpu_check.context import Context

_SECONDS = 25.0
Generate = Callable[[Sequence[list[int]], int], list[list[int]]]


def measure(
    context: Context, loaded: LoadedModel, prompts: Sequence[list[int]], new_tokens: int
) -> list[dict[str, Any]]:
    """A row for each way that works here. A first run of the same size warms up."""
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    model: Any = loaded.model
    model.config.pad_token_id = 1
    found = []
    engines: dict[str, Generate] = {
        "transformers, static batch": lambda p, n: _static(model, p, n),
        "transformers, continuous batching": lambda p, n: _continuous(
            model, p, n, is_small=context.is_dry
        ),
    }
    for name, run in engines.items():
        if not context.has_seconds(_SECONDS, name):
            continue
        try:
            model.set_attn_implementation("sdpa")
            run(prompts, new_tokens)
            started = time.perf_counter()
            answers = run(prompts, new_tokens)
            found.append(row(context, name, answers, time.perf_counter() - started))
        except Exception as problem:
            text = (str(problem) or type(problem).__name__).strip().splitlines()[0][:200]
            context.note(f"{name} not measured: {type(problem).__name__}: {text}")
    if hasattr(model, "destroy_cached_continuous_batching_manager"):
        model.destroy_cached_continuous_batching_manager()
    return found


def row(
    context: Context, name: str, answers: Sequence[Sequence[int]], seconds: float
) -> dict[str, Any]:
    """Output tokens per second, prefill included."""
    tokens = sum(len(answer) for answer in answers)
    context.say(
        f"  {name}: {len(answers)} requests, {tokens:,} tokens in {seconds:.2f} s, "
        f"{tokens / seconds:,.0f} tokens/s"
    )
    return {
        "engine": name,
        "num_requests": len(answers),
        "num_tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }


@torch.inference_mode()
def _static(model: Any, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
    ids = torch.tensor(list(prompts), device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=1,
    )
    answers: list[list[int]] = out[:, ids.shape[1] :].tolist()
    return answers


def _continuous(
    model: Any, prompts: Sequence[list[int]], new_tokens: int, *, is_small: bool
) -> list[list[int]]:
    """Its manager stays between calls where this version can, so that a second one is warm."""
    if not hasattr(model, "generate_batch"):
        raise NotImplementedError("this version of transformers has no generate_batch")
    arguments: dict[str, Any] = {
        "inputs": [list(prompt) for prompt in prompts],
        "generation_config": GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=1
        ),
    }
    if hasattr(model, "destroy_cached_continuous_batching_manager"):
        arguments["persistent_manager"] = True
    if is_small:
        from transformers import ContinuousBatchingConfig

        arguments["continuous_batching_config"] = ContinuousBatchingConfig(
            num_blocks=16, max_batch_tokens=64
        )
    outputs = model.generate_batch(**arguments)
    answers = [list(output.generated_tokens) for output in outputs.values()]
    if len(answers) != len(prompts) or not all(answers):
        raise RuntimeError(f"{len(answers)} of {len(prompts)} requests were answered")
    return answers
