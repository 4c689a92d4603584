"""Learns from one short forward pass what a model's attention looks like, or why it won't do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aptserve_worker.model.adapters import AttentionCall
from aptserve_worker.model.attention import attach, detach_all

_NUM_TOKENS = 5

_KNOWN_ARGUMENTS = frozenset(
    {"scaling", "softcap", "sliding_window", "dropout", "is_causal", "position_ids"}
    | {"use_cache", "output_attentions", "cache_position", "position_embeddings"}
)


class UnsupportedModelError(ValueError):
    """The model cannot be served; the message says why in one sentence."""


@dataclass(slots=True)
class _Recorder:
    """Handler of one module during the probe: plain causal attention, everything written down."""

    module: nn.Module
    calls: list[AttentionCall]
    x: Tensor | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def take_input(self, x: Tensor) -> None:
        self.x = x

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> Tensor:
        self.arguments = arguments
        _check_call(self.module, q, k, v, arguments)
        assert self.x is not None
        window = arguments.get("sliding_window")
        self.calls.append(AttentionCall(self.module, self.x, q.shape[1], k, v, window))
        return q.new_zeros(q.shape)


def _check_call(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]
) -> None:
    name = type(module).__name__
    if k.shape[0] != q.shape[0]:
        raise UnsupportedModelError(f"{name} attends to other tokens than its own sequence's.")
    if v.shape != k.shape or q.shape[-1] != k.shape[-1]:
        raise UnsupportedModelError(
            f"{name} has keys of shape {tuple(k.shape[1:])} and values of shape"
            f" {tuple(v.shape[1:])}; the unit pool needs them alike."
        )
    if getattr(module, "is_causal", True) is False or arguments.get("is_causal") is False:
        raise UnsupportedModelError(f"{name} is not causal.")
    for key, value in arguments.items():
        if key not in _KNOWN_ARGUMENTS and value is not None and not isinstance(value, bool):
            raise UnsupportedModelError(
                f"{name} passes the attention argument {key!r}, which this worker does not know."
            )


def probe(model: nn.Module, vocab_size: int) -> list[AttentionCall]:
    """One call per layer, in order. Raises :class:`UnsupportedModelError`."""
    calls: list[AttentionCall] = []
    for module in model.modules():
        if _may_be_attention(module):
            attach(module, _Recorder(module, calls), with_input=True)
    device = next(model.parameters()).device
    tokens = torch.arange(_NUM_TOKENS, device=device).unsqueeze(0)
    try:
        model(input_ids=(tokens * 7 + 3) % vocab_size, position_ids=tokens, use_cache=False)
    except TypeError as error:
        if "position_ids" not in str(error):
            raise
        raise UnsupportedModelError(
            f"{type(model).__name__} takes no position_ids, so sequences cannot share a batch."
        ) from error
    finally:
        detach_all(model)
    if not calls:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not call transformers' attention interface."
        )
    if len({id(call.module) for call in calls}) != len(calls):
        raise UnsupportedModelError(
            f"{type(model).__name__} calls one attention module several times in a pass."
        )
    if len({call.k.shape[1:] for call in calls}) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has layers of different head counts or sizes."
        )
    return calls


def _may_be_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower() or hasattr(module, "is_causal")
