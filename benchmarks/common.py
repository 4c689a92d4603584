"""What every benchmark needs: the machine's name, medians with their spread, made-up models."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def describe_machine() -> dict[str, Any]:
    """Processor, cores and versions, as a reader needs them to judge a number."""
    import torch
    import transformers

    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median with minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def save_opt_125m(folder: Path) -> Path:
    """A checkpoint of OPT-125m's shape with random float32 weights, made once."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    path = folder / "opt-125m-random"
    if (path / "tokenizer.json").exists():
        return path
    torch.manual_seed(0)
    config = OPTConfig()  # the library's default is OPT-125m
    OPTForCausalLM(config).save_pretrained(path)
    special = {1: "<pad>", 2: "</s>", 3: "<unk>"}
    vocabulary = {special.get(i, f"t{i}"): i for i in range(config.vocab_size)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
    ).save_pretrained(path)
    return path


def make_prompts(count: int, length: int, vocab_size: int = 50272) -> list[list[int]]:
    """Fixed prompts without special tokens."""
    return [
        [4 + (7919 * i + 104729 * j) % (vocab_size - 4) for j in range(length)]
        for i in range(count)
    ]
