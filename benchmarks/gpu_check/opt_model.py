"""A model of OPT-13B's shape with random weights, made on the device without any file."""

from __future__ import annotations

import gc
from typing import Any

import torch
from aptserve_worker.engine import ModelEngine
from aptserve_worker.model.attention import ATTENTION_NAME, detach_all, register
from aptserve_worker.model.loading import LoadedModel
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig

from benchmarks.gpu_check import stand_ins

_OPT_13B: dict[str, Any] = {
    "vocab_size": 50272,
    "hidden_size": 5120,
    "ffn_dim": 20480,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "max_position_embeddings": 2048,
    "word_embed_proj_dim": 5120,
}
_TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 64,
}


def make_model(device: torch.device, *, is_tiny: bool) -> LoadedModel:
    """In bfloat16; tiny in float32. It has no tokenizer and no end-of-sequence token."""
    register()
    sizes = _TINY if is_tiny else _OPT_13B
    config = OPTConfig(**sizes, eos_token_id=None, dropout=0.0)
    torch.manual_seed(0)
    dtype = torch.float32 if is_tiny else torch.bfloat16
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, attn_implementation=ATTENTION_NAME
        )
    model.train(False).requires_grad_(False)
    model.config.pad_token_id = None
    return LoadedModel(
        model=model,
        config=config,
        name="random",
        fingerprint="random",
        architecture=type(model).__name__,
        context_length=sizes["max_position_embeddings"],
        vocab_size=sizes["vocab_size"],
        eos_token_ids=(),
        tokenizer_json=b"",
    )


def make_engine(loaded: LoadedModel, **changes: Any) -> ModelEngine:
    """The worker's engine over the model, with both exact tiers unless told."""
    is_tiny = loaded.vocab_size == _TINY["vocab_size"]
    chosen: dict[str, Any] = {
        "calibrate": False,
        "max_num_seqs": 8 if is_tiny else 256,
        "kernels": "triton" if is_tiny else "auto",
        **({"pool_units": 64} if is_tiny else {}),
        **changes,
    }
    settings = stand_ins.engine_settings(**chosen)
    engine = ModelEngine(loaded, settings)
    if settings.calibrate:
        engine.measure(engine)
    return engine


def detach(model: nn.Module) -> None:
    """Give back what an engine attached; the engine itself is the caller's to forget.

    To the device, too: who looks there for free memory does not see what torch keeps for itself.
    """
    detach_all(model)
    gc.collect()  # recorded steps are part of cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
