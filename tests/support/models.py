"""Small random checkpoints of many architectures, made locally."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 97
CONTEXT = 64

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,  # tied random embeddings make every model repeat its last token
}
_MODERN: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
}
_OPT: dict[str, Any] = {
    **_COMMON,
    "model_type": "opt",
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "word_embed_proj_dim": 32,
    "pad_token_id": 0,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "opt": _OPT,
    "opt-post-norm": {
        **_OPT,
        "do_layer_norm_before": False,
        "word_embed_proj_dim": 16,
        "tie_word_embeddings": True,
    },
    "gpt2": {
        **_COMMON,
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": CONTEXT,
    },
    "llama": {**_MODERN, "model_type": "llama", "num_key_value_heads": 4},
    "llama-grouped": {**_MODERN, "model_type": "llama", "num_key_value_heads": 2},
    "qwen2": {**_MODERN, "model_type": "qwen2", "num_key_value_heads": 2},
    "qwen2-multi-head": {**_MODERN, "model_type": "qwen2", "num_key_value_heads": 4},
    "qwen3-multi-head": {
        **_MODERN,
        "model_type": "qwen3",
        "num_key_value_heads": 4,
        "head_dim": 8,
    },
    "mistral-window": {
        **_MODERN,
        "model_type": "mistral",
        "num_key_value_heads": 2,
        "sliding_window": 7,
    },
    "gpt-neox": {**_MODERN, "model_type": "gpt_neox"},
    "phi": {**_MODERN, "model_type": "phi", "num_key_value_heads": 4},
    "gemma-wide-heads": {
        **_MODERN,
        "model_type": "gemma",
        "hidden_size": 48,
        "num_key_value_heads": 4,
        "head_dim": 16,
    },
    "qwen3": {**_MODERN, "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8},
    "qwen3-moe": {
        **_MODERN,
        "model_type": "qwen3_moe",
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
    "phi3": {**_MODERN, "model_type": "phi3", "num_key_value_heads": 2},
    "starcoder2": {**_MODERN, "model_type": "starcoder2", "num_key_value_heads": 2},
    "gemma2": {
        **_MODERN,
        "model_type": "gemma2",
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 7,
        "attn_logit_softcapping": 2.0,
    },
}


def make_model(name: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model whose greedy continuations vary.

    Weights are larger than an initialiser would make them, so that attention matters, logits differ
    clearly and an error anywhere changes tokens.
    """
    settings = {**ARCHITECTURES[name], **changes}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                fan_in = parameter.shape[-1]
                parameter.normal_(0.0, 1.6 * fan_in**-0.5, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def save_model(folder: Path, name: str, *, seed: int = 0, **changes: Any) -> Path:
    """Save such a model as a safetensors checkpoint and return its folder."""
    path = folder / f"{name}-{seed}"
    if not path.exists():
        make_model(name, seed=seed, **changes).save_pretrained(path)
    return path


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """What transformers' ``generate`` answers, end-of-sequence token included."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    answer: list[int] = out[0, len(prompt) :].tolist()
    return answer
