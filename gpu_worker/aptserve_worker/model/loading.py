"""Loads a model, its tokenizer and what the scheduler has to know of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from aptserve_worker.embedded import embedded_model_path
from aptserve_worker.model.attention import ATTENTION_NAME, register
from aptserve_worker.model.probe import UnsupportedModelError
from aptserve_worker.parallel.group import ALONE, RankGroup

EMBEDDED = "embedded"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal language model in evaluation mode and its description."""

    model: nn.Module
    config: Any
    name: str
    fingerprint: str
    architecture: str
    context_length: int
    vocab_size: int
    eos_token_ids: Sequence[int]
    tokenizer_json: bytes


def load_model(
    source: str,
    *,
    name: str | None,
    device: torch.device,
    dtype: torch.dtype,
    group: RankGroup = ALONE,
) -> LoadedModel:
    """Load ``source``: ``embedded``, a local folder, or a name on the model hub.

    Of a group of ranks each loads its part, all at the same time. Raises
    :class:`UnsupportedModelError` with one sentence when it cannot be served.
    """
    register()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    path = str(embedded_model_path()) if source == EMBEDDED else source
    if path.startswith((".", "/", "~")) and not Path(path).is_dir():
        raise UnsupportedModelError(f"There is no folder {path!r}.")
    try:
        config = AutoConfig.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            **_division(config, group),
        )
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModelError(f"Cannot load {source!r}: {_first_line(error)}") from error
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not use transformers' attention interface."
        )
    fingerprint = _fingerprint(config, model)
    if group.size > 1:
        from aptserve_worker.parallel.weights import settle

        settle(model, group.size)
    model.train(False).to(device)
    text_config = config.get_text_config()
    # Some models compare every input with the padding token, which a flattened batch never has.
    model.config.pad_token_id = None
    return LoadedModel(
        model=model,
        config=text_config,
        name=name or _model_name(source),
        fingerprint=fingerprint,
        architecture=type(model).__name__,
        context_length=_context_length(text_config, source),
        vocab_size=int(text_config.vocab_size),
        eos_token_ids=_eos_token_ids(model),
        tokenizer_json=_tokenizer_json(path),
    )


def _division(config: Any, group: RankGroup) -> dict[str, Any]:
    """What transformers is told about ranks; what it takes is imported only where there are any."""
    if group.size == 1:
        return {}
    from aptserve_worker.parallel.weights import sharding

    return {"distributed_config": sharding(config, group.size)}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _model_name(source: str) -> str:
    if source == EMBEDDED:
        return "aptserve-embedded"
    return Path(source).resolve().name if Path(source).is_dir() else source


def _fingerprint(config: Any, model: nn.Module) -> str:
    """Configuration, dtypes, shapes and a sample of every weight: equal for equal checkpoints."""
    digest = hashlib.sha256()
    fields = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, part in model.state_dict().items():
        weight = part.full_tensor() if hasattr(part, "full_tensor") else part
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu().numpy()
        digest.update(f"{name}{tuple(weight.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()[:16]


def _context_length(config: Any, source: str) -> int:
    """Positions that give the same result for a sequence whatever else is in its batch.

    Rotary embeddings that change with the longest sequence of a batch ("longrope", "dynamic") are
    constant up to the length that the model was first trained with, so they are served up to that.
    """
    for field in ("max_position_embeddings", "n_positions", "max_seq_len"):
        length = getattr(config, field, None)
        if isinstance(length, int) and length > 0:
            break
    else:
        raise UnsupportedModelError(f"The configuration of {source!r} states no context length.")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    if rope.get("rope_type") == "longrope" and original:
        return min(length, int(original))
    return length


def _eos_token_ids(model: nn.Module) -> tuple[int, ...]:
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    if eos is None:
        eos = getattr(model.config, "eos_token_id", None)
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)


def _tokenizer_json(path: str) -> bytes:
    """The tokenizer as ``tokenizers`` JSON, empty when the checkpoint has none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
        return b""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return b"" if backend is None else str(backend.to_str()).encode()
