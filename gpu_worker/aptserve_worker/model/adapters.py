"""Finds, in an attention module, the maps from its input to keys and values.

There is one way to look per way of storing the weights, none per model. What was found is believed
only after it has reproduced the keys and values of a real forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from aptserve_kernels import HeadNorm, KeyProjection, LinearMap, Rotary
from aptserve_kernels.reference import project_keys
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What a forward pass handed to one attention module and to the attention function.

    ``x``: ``[tokens, hidden_size]``; ``k``, ``v``: ``[tokens, num_kv_heads, head_dim]``, of tokens
    at positions 0, 1, ….
    """

    module: nn.Module
    x: Tensor
    num_heads: int
    k: Tensor
    v: Tensor
    window: int | None = None
    """Tokens that a token sees; None: all before it."""


@dataclass(frozen=True, slots=True)
class HiddenMaps:
    """How keys and values of one layer follow from its input."""

    key: KeyProjection
    value: LinearMap


def find_hidden_maps(
    call: AttentionCall, rotary: tuple[Tensor, Tensor] | None
) -> HiddenMaps | None:
    """The maps of ``call.module``, or None when no known form reproduces its keys and values.

    ``rotary``: cos and sin ``[positions, rotary_dim]`` of the model, if it has a rotary embedding.
    """
    for key, value in _weight_forms(call):
        if not _close(value(call.x).view_as(call.v), call.v):
            continue
        for projection in _key_forms(call, key, rotary):
            positions = torch.arange(call.x.shape[0], device=call.x.device)
            head_dim = call.k.shape[-1]
            if _close(project_keys(call.x, positions, projection, head_dim), call.k):
                return HiddenMaps(projection, value)
    return None


def _close(found: Tensor, wanted: Tensor) -> bool:
    tolerance = 1e-4 if wanted.dtype == torch.float32 else 2e-2
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max().clamp_min(1e-3))


def _weight_forms(call: AttentionCall) -> Iterator[tuple[LinearMap, LinearMap]]:
    """Every reading of the module's weights as (keys, values)."""
    for form in (_separate, _fused_conv, _fused_blocks, _fused_per_head):
        maps = form(call)
        if maps is not None:
            yield maps


def _separate(call: AttentionCall) -> tuple[LinearMap, LinearMap] | None:
    """``k_proj`` and ``v_proj``, as in OPT, Llama, Qwen and most others."""
    key = getattr(call.module, "k_proj", None)
    value = getattr(call.module, "v_proj", None)
    if not (isinstance(key, nn.Linear) and isinstance(value, nn.Linear)):
        return None
    return LinearMap(key.weight, key.bias), LinearMap(value.weight, value.bias)


def _fused_conv(call: AttentionCall) -> tuple[LinearMap, LinearMap] | None:
    """One transposed weight ``[in, q + k + v]``, as in GPT-2."""
    fused = getattr(call.module, "c_attn", None)
    if fused is None or isinstance(fused, nn.Linear):
        return None
    return _split_blocks(call, fused.weight.t(), fused.bias)


def _fused_blocks(call: AttentionCall) -> tuple[LinearMap, LinearMap] | None:
    """One weight ``[q + k + v, in]``, as in Phi-3."""
    fused = _fused_linear(call.module)
    return None if fused is None else _split_blocks(call, fused.weight, fused.bias)


def _fused_per_head(call: AttentionCall) -> tuple[LinearMap, LinearMap] | None:
    """One weight whose rows alternate head by head ``[heads, (q, k, v), in]``, as in GPT-NeoX."""
    fused = _fused_linear(call.module)
    heads, head_dim = call.k.shape[1:]
    if fused is None or fused.weight.shape[0] != 3 * heads * head_dim:
        return None
    weight = fused.weight.view(heads, 3, head_dim, -1)
    bias = None if fused.bias is None else fused.bias.view(heads, 3, head_dim)

    def part(index: int) -> LinearMap:
        return LinearMap(
            weight[:, index].flatten(0, 1), None if bias is None else bias[:, index].flatten()
        )

    return part(1), part(2)


def _fused_linear(module: nn.Module) -> nn.Linear | None:
    for name in ("qkv_proj", "query_key_value", "Wqkv", "att_proj", "c_attn"):
        fused = getattr(module, name, None)
        if isinstance(fused, nn.Linear):
            return fused
    return None


def _split_blocks(
    call: AttentionCall, weight: Tensor, bias: Tensor | None
) -> tuple[LinearMap, LinearMap] | None:
    kv_heads, head_dim = call.k.shape[1:]
    sizes = [call.num_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    if weight.shape[0] != sum(sizes):
        return None
    _, key, value = torch.split(weight, sizes)
    key_bias, value_bias = (None, None) if bias is None else torch.split(bias, sizes)[1:]
    return LinearMap(key, key_bias), LinearMap(value, value_bias)


def _key_forms(
    call: AttentionCall, key: LinearMap, rotary: tuple[Tensor, Tensor] | None
) -> Iterator[KeyProjection]:
    """Every way to go on from the linear map, the foldable one first."""
    rotaries: list[Rotary | None] = [None]
    if rotary is not None:
        rotaries += [Rotary(*rotary), Rotary(*rotary, interleaved=True)]
    for norm in (None, *_key_norms(call)):
        for turn in rotaries:
            yield KeyProjection(key, norm, turn)


def _key_norms(call: AttentionCall) -> Iterator[Callable[[Tensor], Tensor]]:
    """Readings of the module's norm on keys: those that a kernel can apply, then the module."""
    norm = _key_norm_module(call)
    if norm is None:
        return
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor) and weight.shape == (call.k.shape[-1],):
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0))
        yield HeadNorm(weight, eps)
        yield HeadNorm(weight + 1, eps)
    spans_heads = isinstance(weight, Tensor) and weight.numel() == call.k.shape[1:].numel()

    def apply(k: Tensor) -> Tensor:
        out: Tensor = norm(k.flatten(-2)).view_as(k) if spans_heads else norm(k)
        return out

    yield apply


def _key_norm_module(call: AttentionCall) -> nn.Module | None:
    for name in ("k_norm", "k_layernorm", "key_layernorm"):
        norm = getattr(call.module, name, None)
        if isinstance(norm, nn.Module):
            return norm
    return None
