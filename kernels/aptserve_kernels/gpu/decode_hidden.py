"""Decode attention over hidden states that serve as keys and as values of all heads.

    s[h, j] = cap(scaling · folded[h] · x_j),   out[h] = Σ_j softmax(s[h])_j · x_j

Bound by memory: a hidden state is read twice, here for the scores and in ``hidden_sum`` for the
sum, ``2 · hidden_size`` elements per token, as many as keys and values of twice the memory have.
Arithmetic is ``4 · heads · hidden_size`` per token, padded to 16, 32 or 64 heads: 64 FLOP per byte
for 40 heads in 16 bits, where an A100 has 150 or more and an H100 300.

A program computes the scores of a tile of tokens for up to 64 heads, a step of the width at a time.
Tokens are the rows of the product and heads its columns, so that few heads waste little. The folded
queries are read once per tile, ``heads / tile`` of the bytes of the states, from the L2 cache.

A few short sequences have too few tiles to fill a GPU. Then tiles are smaller and the width is
divided over programs as well, whose partial products ``hidden_merge`` adds: 4 bytes per head and
token for each part, written once and read once. For 40 heads of 128 elements and 8 parts that is a
quarter of the states, and stays in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from aptserve_kernels.batch import AttentionParams, DecodeBatch
from aptserve_kernels.gpu import hidden_merge, hidden_sum
from aptserve_kernels.gpu.hidden_merge import merge_products
from aptserve_kernels.gpu.hidden_sum import weighted_sum
from aptserve_kernels.gpu.hidden_tiles import (
    PADDED_HEADS,
    VENDOR_TARGETS,
    TileWeights,
    check_cache,
    check_rows,
    dot_precision,
    num_tiles,
    outer_strides,
    padded_heads,
    row_numbers,
    store_tile,
    tokens_of,
    vendor,
    window_of,
)
from aptserve_kernels.gpu.variants import DTYPES, KernelVariant

_PROGRAMS_WANTED = 256
"""Enough to fill the processors of a large GPU about twice."""

_MOST_PARTS = 8
_LEAST_STEPS = 4
"""Of a part: fewer would not fill the stages of the pipeline."""

_COUNTS = (
    "num_heads",
    "hidden_units",
    "max_blocks",
    "block_shift",
    "tiles",
    "part_steps",
    "window",
)


@triton.jit(do_not_specialize=_COUNTS)
def _scores_kernel(
    folded,
    pool,
    tables,
    lengths,
    partials,
    weights,
    maxima,
    sums,
    folded_batch_stride,
    folded_head_stride,
    num_heads,
    unit_width,
    hidden_units,
    max_blocks,
    block_shift,
    tiles,
    part_steps,
    window,
    scaling,
    softcap,
    tile_tokens: tl.constexpr,
    tile_heads: tl.constexpr,
    step_width: tl.constexpr,
    is_divided: tl.constexpr,
    precision: tl.constexpr,
):
    tile, part = tl.program_id(0), tl.program_id(1)
    head_tiles = tl.cdiv(num_heads, tile_heads)
    sequence = (tl.program_id(2) // head_tiles).to(tl.int64)
    heads = tl.program_id(2) % head_tiles * tile_heads + tl.arange(0, tile_heads)
    real = heads < num_heads
    tokens, seen, is_unseen = tokens_of(lengths, sequence, tile, window, tile_tokens)
    if is_unseen:
        return

    products = tl.zeros((tile_tokens, tile_heads), tl.float32)
    queries = folded + sequence * folded_batch_stride + heads[None, :] * folded_head_stride
    for unit in range(hidden_units):
        rows = row_numbers(
            tables, sequence, tokens, seen, unit, max_blocks, hidden_units, block_shift
        )
        states = pool + rows[:, None] * unit_width
        end = tl.minimum((part + 1) * part_steps, tl.cdiv(unit_width, step_width))
        for step in range(part * part_steps, end):
            columns = step * step_width + tl.arange(0, step_width)
            inside = columns < unit_width
            x = tl.load(states + columns[None, :], mask=seen[:, None] & inside[None, :], other=0.0)
            f = tl.load(
                queries + (unit * unit_width + columns)[:, None],
                mask=inside[:, None] & real[None, :],
                other=0.0,
            )
            products = tl.dot(x, f, products, input_precision=precision)

    if is_divided:
        num_sequences = tl.num_programs(2) // head_tiles
        rows = (part.to(tl.int64) * num_sequences + sequence) * num_heads + heads
        places = rows[None, :] * (tiles * tile_tokens) + tokens[:, None]
        tl.store(partials + places, products, mask=real[None, :])
    else:
        store_tile(
            products,
            seen,
            heads,
            sequence,
            tile,
            num_heads,
            tiles,
            weights,
            maxima,
            sums,
            scaling,
            softcap,
            tile_tokens,
        )


@dataclass(frozen=True, slots=True)
class _Config:
    tile: int
    step: int
    num_warps: int
    num_stages: int


def _config(dtype: torch.dtype, heads: int, vendor: str, *, is_small: bool) -> _Config:
    """``heads`` are the columns of the product; ``is_small`` where there are few tiles."""
    num_warps = 8 if heads == 64 else 4
    if dtype is torch.float32:
        return _Config(tile=32, step=16, num_warps=4, num_stages=3)
    if vendor == "amd":
        return _Config(64 if is_small else 128, step=64, num_warps=num_warps, num_stages=3)
    if is_small:
        return _Config(tile=64, step=64, num_warps=4, num_stages=4)
    return _Config(tile=128, step=64, num_warps=num_warps, num_stages=4)


def decode_hidden(
    folded: Tensor,
    pool: Tensor,
    batch: DecodeBatch,
    params: AttentionParams,
    log_sums: Tensor | None = None,
) -> Tensor:
    """As :func:`aptserve_kernels.reference.decode_hidden`; sequences without tokens give zeros.

    ``folded`` has the dtype of the pool and may be any view whose last dimension is contiguous.
    """
    check_cache(pool, batch)
    check_rows("folded", folded, pool, batch, batch.geometry.hidden_size)
    weights = _tile_weights(folded, pool, batch, params)
    if log_sums is not None:
        weights.write_log_sums(log_sums, batch, params)
    return weighted_sum(weights, pool, batch, params)


def _tile_weights(
    folded: Tensor, pool: Tensor, batch: DecodeBatch, params: AttentionParams
) -> TileWeights:
    g = batch.geometry
    num_sequences, num_heads, _ = folded.shape
    heads = padded_heads(num_heads)
    groups = num_sequences * -(-num_heads // heads)
    config = _config(pool.dtype, heads, vendor(), is_small=False)
    if groups * num_tiles(batch, config.tile) < _PROGRAMS_WANTED:
        config = _config(pool.dtype, heads, vendor(), is_small=True)
    found = TileWeights.empty(batch, num_heads, pool.dtype, config.tile)
    steps = -(-g.unit_width // config.step)
    part_steps = _part_steps(steps, groups * found.num_tiles)
    num_parts = -(-steps // part_steps)
    partials = found.sums
    if num_parts > 1:
        partials = torch.empty(num_parts, *found.weights.shape, device=pool.device)
    strides = outer_strides(folded)
    _scores_kernel[(found.num_tiles, num_parts, groups)](
        folded=folded,
        pool=pool,
        tables=batch.tables,
        lengths=batch.lengths,
        partials=partials,
        weights=found.weights,
        maxima=found.maxima,
        sums=found.sums,
        folded_batch_stride=strides[0],
        folded_head_stride=strides[1],
        num_heads=num_heads,
        unit_width=g.unit_width,
        hidden_units=g.hidden_units,
        max_blocks=batch.tables.shape[1],
        block_shift=g.block_size.bit_length() - 1,
        tiles=found.num_tiles,
        part_steps=part_steps,
        window=window_of(params),
        scaling=float(params.scaling),
        softcap=params.softcap or 0.0,
        tile_tokens=config.tile,
        tile_heads=heads,
        step_width=config.step,
        is_divided=num_parts > 1,
        precision=dot_precision(pool.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if num_parts > 1:
        merge_products(partials, found, batch, params)
    return found


def _part_steps(steps: int, num_programs: int) -> int:
    """Steps of the width in one part, so that there are programs enough."""
    parts = min(_MOST_PARTS, -(-_PROGRAMS_WANTED // max(1, num_programs)))
    return max(_LEAST_STEPS, -(-steps // parts))


def variants() -> Iterator[KernelVariant]:
    """Every dtype and number of columns, in whole and in parts; then the kernels that follow."""
    common = {
        **dict.fromkeys(("partials", "maxima", "sums"), "*fp32"),
        **dict.fromkeys(("tables", "lengths"), "*i64"),
        **dict.fromkeys(("folded_batch_stride", "folded_head_stride", "unit_width"), "i32:16"),
        **dict.fromkeys(_COUNTS, "i32"),
        **dict.fromkeys(("scaling", "softcap"), "fp32"),
    }
    for dtype, name in DTYPES.items():
        signature = {**dict.fromkeys(("folded", "pool", "weights"), f"*{name}"), **common}
        for maker, targets in VENDOR_TARGETS.items():
            for heads, config, is_divided in _shapes(dtype, maker):
                constants = {
                    "tile_tokens": config.tile,
                    "tile_heads": heads,
                    "step_width": config.step,
                    "is_divided": is_divided,
                    "precision": dot_precision(dtype),
                }
                yield KernelVariant(
                    f"{maker}-{name}-heads{heads}-tile{config.tile}" + "-divided" * is_divided,
                    _scores_kernel,
                    signature,
                    constants,
                    config.num_warps,
                    config.num_stages,
                    targets,
                )
    yield from hidden_merge.variants()
    yield from hidden_sum.variants()


def _shapes(dtype: torch.dtype, maker: str) -> list[tuple[int, _Config, bool]]:
    """Columns of the product, configuration, and whether the width is divided; each once."""
    found = [
        (heads, _config(dtype, heads, maker, is_small=is_small), is_divided)
        for heads in PADDED_HEADS
        for is_small, is_divided in ((False, False), (True, False), (True, True))
    ]
    return list(dict.fromkeys(found))
