"""Weights of tiles against keys that are projected from hidden states and never written.

    k[j] = rotate_j(norm(W_K x_j + b_K)),   s[h, j] = cap(scaling · q[h] · k[j])

Bound by arithmetic, by design: ``2 · hidden_size · key_width`` FLOP per token, half of what it
takes to project values as well; in 16 bits as many FLOP per byte of hidden state as keys are wide.
So this is the matrix product of all cached states with W_K: a program projects a tile of 128 tokens
to 128 columns, the keys of one or two heads, and scores them while they are in registers. A step of
the width reads ``256 · 2`` bytes for ``128 · 128 · 2`` FLOP, 64 FLOP per byte, from the L2 cache:
programs that follow one another share their states or their weights.

The two elements that a rotation pairs stand in neighbouring columns, wherever they are in a head,
and so in the registers of one thread; one kernel serves both forms of the rotary embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from aptserve_kernels.batch import AttentionParams, DecodeBatch, HeadNorm, KeyProjection
from aptserve_kernels.gpu.hidden_tiles import (
    VENDOR_TARGETS,
    TileWeights,
    dot_precision,
    outer_strides,
    row_numbers,
    store_tile,
    tokens_of,
    vendor,
    window_of,
)
from aptserve_kernels.gpu.variants import DTYPES, HEAD_DIMS, KernelVariant

_TILES_TOGETHER = tl.constexpr(8)
"""Tiles whose programs run side by side for all heads, so that states and weights stay in L2."""

_COUNTS = (
    "num_kv_heads",
    "group",
    "hidden_units",
    "max_blocks",
    "block_shift",
    "tiles",
    "num_sequences",
    "rotary_dim",
    "is_interleaved",
    "has_bias",
    "has_norm",
    "window",
)


@triton.jit(do_not_specialize=_COUNTS)
def _projected_kernel(
    q,
    pool,
    tables,
    lengths,
    key_weight,
    key_bias,
    norm_weight,
    cos,
    sin,
    weights,
    maxima,
    sums,
    q_batch_stride,
    q_head_stride,
    key_stride,
    rotary_stride,
    num_kv_heads,
    group,
    unit_width,
    hidden_units,
    max_blocks,
    block_shift,
    tiles,
    num_sequences,
    rotary_dim,
    is_interleaved,
    has_bias,
    has_norm,
    eps,
    window,
    scaling,
    softcap,
    head_dim: tl.constexpr,
    num_slots: tl.constexpr,
    tile_tokens: tl.constexpr,
    step_width: tl.constexpr,
    precision: tl.constexpr,
):
    # A slot is a pair of elements of one head: columns 2 · slot and 2 · slot + 1 of the product.
    pairs: tl.constexpr = head_dim // 2
    heads_each: tl.constexpr = num_slots // pairs
    head_programs = tl.cdiv(num_kv_heads, heads_each)
    place, head_program = _place(tl.program_id(0), num_sequences * tiles, head_programs)
    sequence, tile = (place // tiles).to(tl.int64), place % tiles
    tokens, seen, is_unseen = tokens_of(lengths, sequence, tile, window, tile_tokens)
    if is_unseen:
        return

    column = tl.arange(0, 2 * num_slots)
    member = column // 2 // pairs
    head = head_program * heads_each + member
    real = (member < heads_each) & (head < num_kv_heads)
    element = _element(column // 2 % pairs, column % 2, rotary_dim, is_interleaved)
    key_rows = key_weight + (head * head_dim + element).to(tl.int64) * key_stride
    keys = tl.zeros((tile_tokens, 2 * num_slots), tl.float32)
    for unit in range(hidden_units):
        rows = row_numbers(
            tables, sequence, tokens, seen, unit, max_blocks, hidden_units, block_shift
        )
        states = pool + rows[:, None] * unit_width
        for step in range(tl.cdiv(unit_width, step_width)):
            width = step * step_width + tl.arange(0, step_width)
            inside = width < unit_width
            x = tl.load(states + width[None, :], mask=seen[:, None] & inside[None, :], other=0.0)
            w = tl.load(
                key_rows[None, :] + (unit * unit_width + width)[:, None],
                mask=inside[:, None] & real[None, :],
                other=0.0,
            )
            keys = tl.dot(x, w, keys, input_precision=precision)
    bias = tl.load(key_bias + head * head_dim + element, mask=real & (has_bias != 0), other=0.0)
    keys += bias.to(tl.float32)[None, :]

    slot = tl.arange(0, num_slots)
    pair, member = slot % pairs, slot // pairs
    first = _element(pair, 0, rotary_dim, is_interleaved)
    second = _element(pair, 1, rotary_dim, is_interleaved)
    k1, k2 = tl.split(tl.reshape(keys, (tile_tokens, num_slots, 2)))
    if has_norm != 0:
        k1, k2 = _norm(k1, k2, norm_weight, first, second, member, eps, head_dim, heads_each)
    angles = tokens[:, None] * rotary_stride
    turns = seen[:, None] & (pair < rotary_dim // 2)[None, :]
    k1, k2 = _rotate(k1, k2, cos + angles, sin + angles, first, second, turns)

    head = head_program * heads_each + member
    real = (member < heads_each) & (head < num_kv_heads)
    for shared in range(group):
        query = q + sequence * q_batch_stride + (head * group + shared) * q_head_stride
        q1 = tl.load(query + first, mask=real, other=0.0).to(tl.float32)
        q2 = tl.load(query + second, mask=real, other=0.0).to(tl.float32)
        products = k1 * q1[None, :] + k2 * q2[None, :]
        for i in tl.static_range(heads_each):
            score = tl.sum(tl.where((member == i)[None, :], products, 0.0), 1)
            query_head = (head_program * heads_each + i) * group + shared
            store_tile(
                score[:, None],
                seen,
                tl.full((1,), 0, tl.int32) + query_head,
                sequence,
                tile,
                num_kv_heads * group,
                tiles,
                weights,
                maxima,
                sums,
                scaling,
                softcap,
                tile_tokens,
            )


@triton.jit
def _place(program, num_places, head_programs):
    """Tile and group of heads of a program: a few tiles, all heads, then the next tiles."""
    first = program // (_TILES_TOGETHER * head_programs) * _TILES_TOGETHER
    count = tl.minimum(num_places - first, _TILES_TOGETHER)
    rest = program % (_TILES_TOGETHER * head_programs)
    return first + rest % count, rest // count


@triton.jit
def _element(pair, half, rotary_dim, is_interleaved):
    """Which element of a head is half 0 or 1 of a pair; pairs that do not turn are neighbours."""
    is_apart = (pair < rotary_dim // 2) & (is_interleaved == 0)
    return tl.where(is_apart, pair + half * (rotary_dim // 2), 2 * pair + half)


@triton.jit
def _norm(
    k1,
    k2,
    norm_weight,
    first,
    second,
    member,
    eps,
    head_dim: tl.constexpr,
    heads_each: tl.constexpr,
):
    """Each head over its root mean square, times the weight."""
    squares = k1 * k1 + k2 * k2
    scale = tl.zeros_like(squares)
    for i in tl.static_range(heads_each):
        mine = (member == i)[None, :]
        mean = tl.sum(tl.where(mine, squares, 0.0), 1) / head_dim
        scale = tl.where(mine, tl.rsqrt(mean + eps)[:, None], scale)
    weight1 = tl.load(norm_weight + first).to(tl.float32)
    weight2 = tl.load(norm_weight + second).to(tl.float32)
    return k1 * scale * weight1[None, :], k2 * scale * weight2[None, :]


@triton.jit
def _rotate(k1, k2, cos, sin, first, second, turns):
    """Pairs turned by the angles of their tokens; ``cos`` and ``sin`` point at rows of angles."""
    cos1 = tl.load(cos + first[None, :], mask=turns, other=1.0).to(tl.float32)
    sin1 = tl.load(sin + first[None, :], mask=turns, other=0.0).to(tl.float32)
    turned = k1 * cos1 - k2 * sin1
    cos2 = tl.load(cos + second[None, :], mask=turns, other=1.0).to(tl.float32)
    sin2 = tl.load(sin + second[None, :], mask=turns, other=0.0).to(tl.float32)
    return turned, k2 * cos2 + k1 * sin2


@dataclass(frozen=True, slots=True)
class _Config:
    slots: int
    tile: int
    step: int
    num_warps: int
    num_stages: int


def _config(dtype: torch.dtype, head_dim: int, vendor: str) -> _Config:
    """128 columns or 256, whichever whole heads fill better; half the tokens for the latter."""
    pairs = head_dim // 2
    slots = max((64, 128), key=lambda n: n // pairs * pairs / n)
    tile = 128 * 64 // slots
    if dtype is torch.float32:
        tile = tile // 2 if vendor == "nvidia" else 64
        return _Config(slots, tile, step=16, num_warps=16, num_stages=3)
    if vendor == "amd":
        return _Config(slots, tile, step=tile // 2, num_warps=slots // 8, num_stages=2)
    return _Config(slots, tile, step=64, num_warps=8, num_stages=4)


def tile_tokens(dtype: torch.dtype, head_dim: int) -> int:
    """Tokens of a tile that :func:`project_and_score` fills."""
    return _config(dtype, head_dim, vendor()).tile


def project_and_score(
    q: Tensor,
    pool: Tensor,
    batch: DecodeBatch,
    params: AttentionParams,
    projection: KeyProjection,
    into: TileWeights,
) -> None:
    """Fill ``into``, of tiles of :func:`tile_tokens`. The norm is a ``HeadNorm`` or None."""
    g, rotary, norm = batch.geometry, projection.rotary, projection.norm
    weight, bias = projection.map.weight, projection.map.bias
    config = _config(pool.dtype, g.head_dim, vendor())
    num_sequences, num_heads, _ = q.shape
    head_programs = -(-g.num_kv_heads // (config.slots // (g.head_dim // 2)))
    strides = outer_strides(q)
    _projected_kernel[(num_sequences * into.num_tiles * head_programs,)](
        q=q,
        pool=pool,
        tables=batch.tables,
        lengths=batch.lengths,
        key_weight=weight,
        # What is absent is not read; the weight stands in its place.
        key_bias=weight if bias is None else bias,
        norm_weight=norm.weight if isinstance(norm, HeadNorm) else weight,
        cos=weight if rotary is None else rotary.cos,
        sin=weight if rotary is None else rotary.sin,
        weights=into.weights,
        maxima=into.maxima,
        sums=into.sums,
        q_batch_stride=strides[0],
        q_head_stride=strides[1],
        key_stride=weight.stride(0),
        rotary_stride=0 if rotary is None else rotary.cos.stride(0),
        num_kv_heads=g.num_kv_heads,
        group=num_heads // g.num_kv_heads,
        unit_width=g.unit_width,
        hidden_units=g.hidden_units,
        max_blocks=batch.tables.shape[1],
        block_shift=g.block_size.bit_length() - 1,
        tiles=into.num_tiles,
        num_sequences=num_sequences,
        rotary_dim=0 if rotary is None else rotary.cos.shape[1],
        is_interleaved=int(rotary is not None and rotary.interleaved),
        has_bias=int(bias is not None),
        has_norm=int(norm is not None),
        eps=norm.eps if isinstance(norm, HeadNorm) else 0.0,
        window=window_of(params),
        scaling=float(params.scaling),
        softcap=params.softcap or 0.0,
        head_dim=g.head_dim,
        num_slots=config.slots,
        tile_tokens=config.tile,
        step_width=config.step,
        precision=dot_precision(pool.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def variants() -> Iterator[KernelVariant]:
    """Every dtype and head size; cos and sin in the dtype of the model, as transformers gives."""
    pointers = ("q", "pool", "key_weight", "key_bias", "norm_weight", "cos", "sin", "weights")
    strides = ("q_batch_stride", "q_head_stride", "key_stride", "rotary_stride")
    common = {
        **dict.fromkeys(("maxima", "sums"), "*fp32"),
        **dict.fromkeys(("tables", "lengths"), "*i64"),
        **dict.fromkeys((*strides, "unit_width"), "i32:16"),
        **dict.fromkeys(_COUNTS, "i32"),
        **dict.fromkeys(("eps", "scaling", "softcap"), "fp32"),
    }
    for dtype, name in DTYPES.items():
        signature = {**dict.fromkeys(pointers, f"*{name}"), **common}
        for maker, targets in VENDOR_TARGETS.items():
            for head_dim in HEAD_DIMS:
                config = _config(dtype, head_dim, maker)
                yield KernelVariant(
                    f"{maker}-{name}-head{head_dim}",
                    _projected_kernel,
                    signature,
                    {
                        "head_dim": head_dim,
                        "num_slots": config.slots,
                        "tile_tokens": config.tile,
                        "step_width": config.step,
                        "precision": dot_precision(dtype),
                    },
                    config.num_warps,
                    config.num_stages,
                    targets,
                )
