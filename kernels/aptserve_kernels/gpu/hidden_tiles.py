"""What the kernels over hidden states share: tokens of a tile, their rows, weights tile by tile.

A tile is a run of consecutive tokens of one sequence. The softmax of a row of scores is kept in two
levels: each tile holds ``weights = exp2(s - m)`` in the dtype of the cache, and its own ``m`` and
sum in float32, where s are the scores times log2(e). So the pass that computes scores needs no
other tile, and the pass that uses them computes no exponential per token. ``m`` is the maximum of
the tile rounded up to a whole number: to bring a tile to the maximum of several, its weights are
multiplied by a power of two, which rounds nothing.

In 16 bits the weights take ``2 · heads`` bytes per token beside ``2 · hidden_size`` of the hidden
state: less than 2 % where a head has 64 elements or more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from aptserve_kernels.batch import AttentionParams, DecodeBatch
from aptserve_kernels.gpu.variants import DTYPES, TARGETS

TILES = (32, 64, 128)
"""Tokens of a tile."""

PADDED_HEADS = (16, 32, 64)
"""Heads of one program. More than 64 take several, which share the states through the L2 cache."""

VENDOR_TARGETS = {"nvidia": TARGETS[:3], "amd": TARGETS[3:]}
"""A processor of AMD has 64 KiB of shared memory, room for fewer stages of a pipeline."""

_NO_WINDOW = 2**31 - 1
_LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True)
class TileWeights:
    """Unnormalised softmax weights of a batch, in tiles of ``tile`` tokens.

    ``weights``: ``[batch, heads, tiles * tile]`` in the dtype of the cache; ``maxima`` and
    ``sums``: ``[batch, heads, tiles]`` float32. Tiles without a visible token hold anything.
    """

    weights: Tensor
    maxima: Tensor
    sums: Tensor
    tile: int

    @classmethod
    def empty(
        cls, batch: DecodeBatch, num_heads: int, dtype: torch.dtype, tile: int
    ) -> TileWeights:
        """Uninitialised, for all tokens that fit the tables: the host knows no lengths."""
        rows, tiles, device = batch.tables.shape[0], num_tiles(batch, tile), batch.tables.device
        weights = torch.empty(rows, num_heads, tiles * tile, dtype=dtype, device=device)
        statistics = torch.empty(2, rows, num_heads, tiles, device=device)
        return cls(weights, statistics[0], statistics[1], tile)

    @property
    def num_tiles(self) -> int:
        """Tiles of a row."""
        return self.maxima.shape[2]

    def write_log_sums(self, out: Tensor, batch: DecodeBatch, params: AttentionParams) -> None:
        """Fill ``out`` ``[batch, heads]`` float32 with the logarithms of the sums of all tiles."""
        lengths = batch.lengths.unsqueeze(1)
        starts = torch.arange(self.num_tiles, device=lengths.device) * self.tile
        seen = (starts < lengths) & (starts + self.tile > lengths - window_of(params))
        unseen = ~seen.unsqueeze(1)
        maxima = self.maxima.masked_fill(unseen, float("-inf"))
        largest = maxima.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
        sums = (self.sums.masked_fill(unseen, 0.0) * (maxima - largest).exp2()).sum(-1)
        out.copy_((sums.log2() + largest.squeeze(-1)) * math.log(2))


def num_tiles(batch: DecodeBatch, tile: int) -> int:
    """Tiles of the longest sequence that the tables have room for."""
    return max(1, -(-batch.tables.shape[1] * batch.geometry.block_size // tile))


def padded_heads(num_heads: int) -> int:
    """The one of ``PADDED_HEADS`` that fits ``num_heads`` best."""
    return next((size for size in PADDED_HEADS if size >= num_heads), PADDED_HEADS[-1])


def dot_precision(dtype: torch.dtype) -> str:
    """How matrix products of float32 are computed: exactly. The other dtypes have no choice."""
    return "ieee" if dtype is torch.float32 else "tf32"


def window_of(params: AttentionParams) -> int:
    """The window as a number for a kernel."""
    return _NO_WINDOW if params.window is None else min(params.window, _NO_WINDOW)


def vendor() -> str:
    """Whose GPUs this process runs on, a key of ``VENDOR_TARGETS``."""
    return "nvidia" if torch.version.hip is None else "amd"


def outer_strides(rows: Tensor) -> tuple[int, int]:
    """Strides of ``[batch, heads, width]``; 0 where only one place is ever read."""
    return (
        rows.stride(0) if rows.shape[0] > 1 else 0,
        rows.stride(1) if rows.shape[1] > 1 else 0,
    )


def check_cache(pool: Tensor, batch: DecodeBatch) -> None:
    """The layout of pool and tables that all kernels over hidden states expect."""
    g, tables, lengths = batch.geometry, batch.tables, batch.lengths
    if pool.dtype not in DTYPES:
        raise ValueError(f"pool: dtype {pool.dtype} is not supported")
    if not pool.is_contiguous() or pool.shape[1:] != (g.block_size, g.unit_width):
        raise ValueError(f"pool: expected contiguous [units, {g.block_size}, {g.unit_width}]")
    if not g.hidden_units or g.unit_width % 8 or g.block_size & (g.block_size - 1):
        raise ValueError(f"batch.geometry: no hidden tier, or no sizes for a kernel: {g}")
    if tables.dtype != torch.int64 or tables.dim() != 3 or tables.shape[2] != g.hidden_units:
        raise ValueError(f"batch.tables: expected int64 [batch, blocks, {g.hidden_units}]")
    if not tables.is_contiguous():
        raise ValueError("batch.tables: must be contiguous")
    if lengths.dtype != torch.int64 or lengths.shape != tables.shape[:1] or lengths.stride(0) != 1:
        raise ValueError("batch.lengths: expected contiguous int64 [batch]")


def check_rows(name: str, rows: Tensor, pool: Tensor, batch: DecodeBatch, width: int) -> None:
    """Queries ``[batch, heads, width]``; outer strides are free but keep vectors aligned."""
    size = batch.lengths.shape[0]
    if rows.dim() != 3 or (rows.shape[0], rows.shape[2]) != (size, width):
        raise ValueError(f"{name}: {tuple(rows.shape)}, expected [{size}, heads, {width}]")
    if rows.dtype != pool.dtype:
        raise ValueError(f"{name}: {rows.dtype} beside a pool of {pool.dtype}")
    if rows.stride(2) != 1 or any(stride % 8 for stride in outer_strides(rows)):
        raise ValueError(f"{name}: strides {rows.stride()}; the last must be 1, the others 8 n")


@triton.jit
def first_visible(length, window):
    """The first token that a query after ``length`` tokens sees."""
    return tl.maximum(length - window, 0)


@triton.jit
def tokens_of(lengths, sequence, tile, window, tile_tokens: tl.constexpr):
    """Tokens of a tile, which of them are visible, and whether none is."""
    length = tl.load(lengths + sequence).to(tl.int32)
    begin = first_visible(length, window)
    start = tile * tile_tokens
    tokens = start + tl.arange(0, tile_tokens)
    is_unseen = (start >= length) | (start + tile_tokens <= begin)
    return tokens, (tokens >= begin) & (tokens < length), is_unseen


@triton.jit
def row_numbers(tables, sequence, tokens, seen, unit, max_blocks, hidden_units, block_shift):
    """Rows of ``pool.view(-1, unit_width)`` that hold unit ``unit`` of each token's state."""
    entries = (sequence * max_blocks + (tokens >> block_shift)) * hidden_units + unit
    units = tl.load(tables + entries, mask=seen, other=0)
    return (units << block_shift) + (tokens & ((1 << block_shift) - 1))


@triton.jit
def _log2_scores(products, scaling, softcap):
    """Scores times log2(e), from plain products. ``softcap`` 0 means none."""
    scores = products * scaling
    if softcap > 0:
        # tanh y = (1 - e) / (1 + e), e = exp(-2 y), of the magnitude: e does not overflow.
        e = tl.exp2(tl.abs(scores) * (-2 * _LOG2E / softcap))
        capped = softcap * (1 - e) / (1 + e)
        scores = tl.where(scores < 0, -capped, capped)
    return scores * _LOG2E


@triton.jit
def store_tile(
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
    tile_tokens: tl.constexpr,
):
    """Turn the products ``[tile_tokens, heads]`` of one tile into its part of ``TileWeights``."""
    scores = tl.where(seen[:, None], _log2_scores(products, scaling, softcap), float("-inf"))
    maximum = tl.ceil(tl.max(scores, 0))
    shares = tl.exp2(scores - maximum[None, :])
    real = heads < num_heads
    row_tiles = (sequence * num_heads + heads) * tiles + tile
    places = row_tiles[None, :] * tile_tokens + tl.arange(0, tile_tokens)[:, None]
    tl.store(weights + places, shares.to(weights.dtype.element_ty), mask=real[None, :])
    tl.store(maxima + row_tiles, maximum, mask=real)
    tl.store(sums + row_tiles, tl.sum(shares, 0), mask=real)
