"""How a model's weights are divided over ranks.

The plan is transformers' own, where a model has one. For models without it there is one reading of
their structure, none per model: attention with separate projections and a feed-forward of two
layers, as in OPT and BioGPT.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from aptserve_worker.model.probe import UnsupportedModelError

_COLUMNS, _ROWS = "colwise", "rowwise"
"""Output features divided, input features divided: together one sum over ranks."""

_ATTENTION = {"q_proj": _COLUMNS, "k_proj": _COLUMNS, "v_proj": _COLUMNS, "out_proj": _ROWS}
_FEED_FORWARD = {"fc1": _COLUMNS, "fc2": _ROWS}


def sharding(config: Any, size: int) -> DistributedConfig:
    """How to load a model of ``config`` on ``size`` ranks. Raises :class:`UnsupportedModelError`.

    Every rank has to hold whole heads, and as many as the others.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if heads % size or kv_heads % size:
        raise UnsupportedModelError(
            f"--tensor-parallel {size} does not divide the model's {heads} attention heads"
            f" and {kv_heads} key heads."
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # type: ignore[no-untyped-call]
    plan = dict(getattr(model, "tp_plan", None) or {}) or _structural_plan(model)
    if not plan:
        raise UnsupportedModelError(
            f"transformers has no tensor-parallel plan for {type(model).__name__}; serve it without"
            " --tensor-parallel."
        )
    return DistributedConfig(tp_size=size, tp_plan=plan)


def _structural_plan(model: nn.Module) -> dict[str, str]:
    """A plan for models that state none, layer numbers as ``*``; empty where none fits."""
    plan: dict[str, str] = {}
    for name, module in model.named_modules():
        for parts in (_ATTENTION, _FEED_FORWARD):
            if _has_all(module, parts):
                prefix = re.sub(r"\b\d+\b", "*", name)
                plan |= {f"{prefix}.{part}": style for part, style in parts.items()}
    return plan if len(plan) == len(_ATTENTION) + len(_FEED_FORWARD) else {}


def settle(model: nn.Module, size: int) -> None:
    """After loading: keep what each rank holds of linear layers as plain tensors.

    transformers wraps every divided weight and unwraps it again in each pass, which takes the host
    longer than a decode step has. Attention modules that count their heads are told how many are
    left.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if isinstance(parameter, DTensor):
                    local = nn.Parameter(parameter.to_local(), requires_grad=False)
                    setattr(module, name, local)
        if _has_all(module, _ATTENTION):
            num_heads = getattr(module, "num_heads", None)
            if isinstance(num_heads, int):
                setattr(module, "num_heads", num_heads // size)  # noqa: B010


def _has_all(module: nn.Module, parts: Iterable[str]) -> bool:
    return all(isinstance(getattr(module, part, None), nn.Linear) for part in parts)
