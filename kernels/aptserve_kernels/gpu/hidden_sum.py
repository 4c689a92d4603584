"""Weighted sums of hidden states, from weights tile by tile.

    out[h] = Σ_j exp2(m_t(j) - m) · weight[h, j] · x_j / Σ_t exp2(m_t - m) · sum_t,   m = max m_t

Bound by memory: each hidden state is read once. A program reads a run of 128 elements of each and
holds the sums of up to 64 heads over that run in registers. The weights come from the L2 cache,
once per program: ``heads / 128`` of the bytes of the states.

Sequences are walked from the last to the first. The pass that computed the weights went the other
way, so what it read last is still in the L2 cache; a batch that fits there is read once in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from aptserve_kernels.batch import AttentionParams, DecodeBatch
from aptserve_kernels.gpu import hidden_splits
from aptserve_kernels.gpu.hidden_splits import SPLIT_COUNTS, Splits, combine, split_tiles
from aptserve_kernels.gpu.hidden_tiles import (
    PADDED_HEADS,
    TILES,
    VENDOR_TARGETS,
    TileWeights,
    dot_precision,
    first_visible,
    padded_heads,
    row_numbers,
    vendor,
    window_of,
)
from aptserve_kernels.gpu.variants import DTYPES, KernelVariant

_COUNTS = (*SPLIT_COUNTS, "hidden_units", "max_blocks", "block_shift", "tiles")


@triton.jit
def _merge_tiles(maxima, sums, rows, real, first, end, tiles, tile_heads: tl.constexpr):
    """Maximum and sum of each head over tiles ``[first, end)``; the sum is 0 without any."""
    maximum = tl.full((tile_heads,), -1e30, tl.float32)
    total = tl.zeros((tile_heads,), tl.float32)
    for chunk in range(first, end, 16):
        members = chunk + tl.arange(0, 16)
        places = rows[:, None] * tiles + members[None, :]
        mask = real[:, None] & (members < end)[None, :]
        tile_maxima = tl.load(maxima + places, mask=mask, other=float("-inf"))
        tile_sums = tl.load(sums + places, mask=mask, other=0.0)
        larger = tl.maximum(maximum, tl.max(tile_maxima, 1))
        total *= tl.exp2(maximum - larger)
        total += tl.sum(tile_sums * tl.exp2(tile_maxima - larger[:, None]), 1)
        maximum = larger
    return maximum, total


@triton.jit(do_not_specialize=_COUNTS)
def _sum_kernel(
    weights,
    maxima,
    sums,
    pool,
    tables,
    lengths,
    out,
    split_maxima,
    split_sums,
    num_heads,
    unit_width,
    hidden_units,
    max_blocks,
    block_shift,
    tiles,
    num_splits,
    min_split_tiles,
    window,
    tile_tokens: tl.constexpr,
    tile_heads: tl.constexpr,
    run_width: tl.constexpr,
    step_tokens: tl.constexpr,
    is_split: tl.constexpr,
    precision: tl.constexpr,
):
    unit_runs = tl.cdiv(unit_width, run_width)
    unit = tl.program_id(0) // unit_runs
    columns = tl.program_id(0) % unit_runs * run_width + tl.arange(0, run_width)
    inside = columns < unit_width
    split = tl.program_id(1)
    head_tiles = tl.cdiv(num_heads, tile_heads)
    place = tl.num_programs(2) - 1 - tl.program_id(2)
    sequence = (place // head_tiles).to(tl.int64)
    heads = place % head_tiles * tile_heads + tl.arange(0, tile_heads)
    real = heads < num_heads
    rows = sequence * num_heads + heads

    length = tl.load(lengths + sequence).to(tl.int32)
    first, end = split_tiles(length, window, split, num_splits, min_split_tiles, tile_tokens)
    if is_split and first >= end:
        return
    maximum, total = _merge_tiles(maxima, sums, rows, real, first, end, tiles, tile_heads)

    begin = first_visible(length, window)
    acc = tl.zeros((tile_heads, run_width), tl.float32)
    for start in range(first * tile_tokens, tl.minimum(end * tile_tokens, length), step_tokens):
        tokens = start + tl.arange(0, step_tokens)
        seen = (tokens >= begin) & (tokens < length)
        numbers = row_numbers(
            tables, sequence, tokens, seen, unit, max_blocks, hidden_units, block_shift
        )
        x = tl.load(
            pool + numbers[:, None] * unit_width + columns[None, :],
            mask=seen[:, None] & inside[None, :],
            other=0.0,
        )
        shares = tl.load(
            weights + rows[:, None] * (tiles * tile_tokens) + tokens[None, :],
            mask=real[:, None],
            other=0.0,
        )
        row_tiles = rows * tiles + start // tile_tokens
        tile_maxima = tl.load(maxima + row_tiles, mask=real, other=float("-inf"))
        p = shares.to(tl.float32) * tl.exp2(tile_maxima - maximum)[:, None]
        acc = tl.dot(p.to(x.dtype), x, acc, input_precision=precision)

    if is_split:
        rows = (sequence * num_splits + split) * num_heads + heads
        if tl.program_id(0) == 0:
            tl.store(split_maxima + rows, maximum, mask=real)
            tl.store(split_sums + rows, total, mask=real)
    else:
        # A sequence without tokens has no sum; its result is zero.
        acc /= tl.where(total > 0, total, 1.0)[:, None]
    places = rows[:, None] * (hidden_units * unit_width) + unit * unit_width + columns[None, :]
    mask = real[:, None] & inside[None, :]
    tl.store(out + places, acc.to(out.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class _Config:
    width: int
    step: int
    num_warps: int
    num_stages: int


def _config(dtype: torch.dtype, heads: int, vendor: str) -> _Config:
    """``heads`` are the rows of the product.

    The rows of a tile are found through the tables, so the stages of the pipeline serve two loads
    in a row: of seven, three hold hidden states.
    """
    num_warps = 4 if heads == 16 else 8
    if dtype is torch.float32:
        return _Config(width=64, step=16, num_warps=num_warps, num_stages=5)
    return _Config(128, step=64, num_warps=num_warps, num_stages=7 if vendor == "nvidia" else 4)


def weighted_sum(
    weights: TileWeights, pool: Tensor, batch: DecodeBatch, params: AttentionParams
) -> Tensor:
    """Hidden states ``[batch, heads, hidden_size]`` summed by the softmax of their scores.

    ``pool``: ``[num_units, block_size, unit_width]``; the weights were made with the same window.
    Sequences without tokens give zeros.
    """
    g = batch.geometry
    num_sequences, num_heads, _ = weights.weights.shape
    heads = padded_heads(num_heads)
    config = _config(pool.dtype, heads, vendor())
    groups = num_sequences * -(-num_heads // heads)
    runs = g.hidden_units * -(-g.unit_width // config.width)
    splits = Splits.of(weights, runs * groups)
    out = pool.new_empty(num_sequences, num_heads, g.hidden_size)
    partials, statistics = out, weights.maxima
    if splits.count > 1:
        shape = (num_sequences, splits.count, num_heads)
        partials = torch.empty(*shape, g.hidden_size, device=pool.device)
        statistics = torch.empty(2, *shape, device=pool.device)
    _sum_kernel[(runs, splits.count, groups)](
        weights=weights.weights,
        maxima=weights.maxima,
        sums=weights.sums,
        pool=pool,
        tables=batch.tables,
        lengths=batch.lengths,
        out=partials,
        split_maxima=statistics[0],
        split_sums=statistics[-1],
        num_heads=num_heads,
        unit_width=g.unit_width,
        hidden_units=g.hidden_units,
        max_blocks=batch.tables.shape[1],
        block_shift=g.block_size.bit_length() - 1,
        tiles=weights.num_tiles,
        num_splits=splits.count,
        min_split_tiles=splits.min_tiles,
        window=window_of(params),
        tile_tokens=weights.tile,
        tile_heads=heads,
        run_width=config.width,
        step_tokens=config.step,
        is_split=splits.count > 1,
        precision=dot_precision(pool.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits.count > 1:
        combine(partials, statistics, splits, batch, params, weights.tile, out)
    return out


def variants() -> Iterator[KernelVariant]:
    """Every dtype and number of rows, whole and split; then the kernel that adds splits.

    The tile is a mere factor: the largest stands for all.
    """
    common = {
        **dict.fromkeys(("maxima", "sums", "split_maxima", "split_sums"), "*fp32"),
        **dict.fromkeys(("tables", "lengths"), "*i64"),
        "unit_width": "i32:16",
        **dict.fromkeys(_COUNTS, "i32"),
    }
    for dtype, name in DTYPES.items():
        signature = {**dict.fromkeys(("pool", "weights"), f"*{name}"), **common}
        for maker, targets in VENDOR_TARGETS.items():
            for heads, is_split in product(PADDED_HEADS, (False, True)):
                config = _config(dtype, heads, maker)
                yield KernelVariant(
                    f"{maker}-{name}-heads{heads}" + "-split" * is_split,
                    _sum_kernel,
                    {**signature, "out": "*fp32" if is_split else f"*{name}"},
                    {
                        "tile_tokens": TILES[-1],
                        "tile_heads": heads,
                        "run_width": config.width,
                        "step_tokens": config.step,
                        "is_split": is_split,
                        "precision": dot_precision(dtype),
                    },
                    config.num_warps,
                    config.num_stages,
                    targets,
                )
    yield from hidden_splits.variants()
