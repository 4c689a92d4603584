"""Contexts in splits, one program for each, and the kernel that adds their weighted sums.

A result is ``heads`` times as wide as a hidden state, so partial results are dear: a split of n
tokens writes and reads ``8 · heads`` bytes for ``2 · n`` of states (16 bits). So there are only as
many splits as fill the GPU, of at least ``8 · heads`` tokens. That is half the bytes of the states
at worst, for a few sequences whose partial results fit the L2 cache.

Each sequence divides its own visible tiles, so that a short context in tables with room for a long
one is split too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from aptserve_kernels.batch import AttentionParams, DecodeBatch
from aptserve_kernels.gpu.hidden_tiles import TILES, TileWeights, first_visible, window_of
from aptserve_kernels.gpu.variants import DTYPES, KernelVariant

SPLIT_COUNTS = ("num_heads", "num_splits", "min_split_tiles", "window")
"""Arguments of the kernels that know of splits."""

_PROGRAMS_WANTED = 256
"""Enough to fill the processors of a large GPU about twice."""

_LONGEST_SPLIT = 8192
"""Tokens that one program sums at most, so that one long sequence does not hold up a batch."""

_MOST_SPLITS = 64
_RUN_WIDTH = 512


@triton.jit
def split_tiles(length, window, split, num_splits, min_split_tiles, tile_tokens: tl.constexpr):
    """First and end tile of a split: each sequence divides its own visible tiles evenly."""
    begin = first_visible(length, window) // tile_tokens
    end = tl.cdiv(length, tile_tokens)
    size = tl.maximum(tl.cdiv(end - begin, num_splits), min_split_tiles)
    first = begin + split * size
    return first, tl.minimum(first + size, end)


@triton.jit(do_not_specialize=SPLIT_COUNTS)
def _combine_kernel(
    partials,
    split_maxima,
    split_sums,
    lengths,
    out,
    num_heads,
    width,
    num_splits,
    min_split_tiles,
    window,
    tile_tokens: tl.constexpr,
    max_splits: tl.constexpr,
    run_width: tl.constexpr,
):
    columns = tl.program_id(1) * run_width + tl.arange(0, run_width)
    inside = columns < width
    head = tl.program_id(0) % num_heads
    sequence = (tl.program_id(0) // num_heads).to(tl.int64)
    length = tl.load(lengths + sequence).to(tl.int32)
    splits = tl.arange(0, max_splits)
    first, end = split_tiles(length, window, splits, num_splits, min_split_tiles, tile_tokens)
    used = (splits < num_splits) & (first < end)
    row = sequence * num_splits * num_heads + head
    maxima = tl.load(split_maxima + row + splits * num_heads, mask=used, other=-1e30)
    sums = tl.load(split_sums + row + splits * num_heads, mask=used, other=0.0)
    maximum = tl.max(maxima, 0)
    total = tl.sum(sums * tl.exp2(maxima - maximum), 0)
    acc = tl.zeros((run_width,), tl.float32)
    for _ in range(tl.sum(used.to(tl.int32), 0)):
        part = tl.load(partials + row * width + columns, mask=inside, other=0.0)
        acc += part * tl.exp2(tl.load(split_maxima + row) - maximum)
        row += num_heads
    # A sequence without tokens has no splits; its result is zero.
    acc /= tl.where(total > 0, total, 1.0)
    place = (sequence * num_heads + head) * width + columns
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Splits:
    """How contexts are divided: into at most ``count`` splits of at least ``min_tiles`` tiles."""

    count: int
    min_tiles: int

    @classmethod
    def of(cls, weights: TileWeights, num_programs: int) -> Splits:
        """The division for ``num_programs`` programs per split; the host knows no lengths."""
        num_heads, tokens = weights.weights.shape[1:]
        min_tiles = -(-8 * num_heads // weights.tile)
        wanted = max(-(-_PROGRAMS_WANTED // num_programs), -(-tokens // _LONGEST_SPLIT))
        possible = -(-weights.num_tiles // min_tiles)
        return cls(min(wanted, possible, _MOST_SPLITS), min_tiles)


def combine(
    partials: Tensor,
    statistics: Tensor,
    splits: Splits,
    batch: DecodeBatch,
    params: AttentionParams,
    tile: int,
    out: Tensor,
) -> None:
    """Add partial sums ``[batch, splits, heads, hidden_size]``.

    ``statistics``: ``[2, batch, splits, heads]``, maxima and sums of the weights of each split.
    """
    num_sequences, num_heads, width = out.shape
    _combine_kernel[(num_sequences * num_heads, -(-width // _RUN_WIDTH))](
        partials=partials,
        split_maxima=statistics[0],
        split_sums=statistics[1],
        lengths=batch.lengths,
        out=out,
        num_heads=num_heads,
        width=width,
        num_splits=splits.count,
        min_split_tiles=splits.min_tiles,
        window=window_of(params),
        tile_tokens=tile,
        max_splits=_MOST_SPLITS,
        run_width=_RUN_WIDTH,
        num_warps=4,
        num_stages=2,
    )


def variants() -> Iterator[KernelVariant]:
    """Every dtype."""
    signature = {
        **dict.fromkeys(("partials", "split_maxima", "split_sums"), "*fp32"),
        **dict.fromkeys(SPLIT_COUNTS, "i32"),
        "lengths": "*i64",
        "width": "i32:16",
    }
    constants = {
        "tile_tokens": TILES[-1],
        "max_splits": _MOST_SPLITS,
        "run_width": _RUN_WIDTH,
    }
    for name in DTYPES.values():
        yield KernelVariant(name, _combine_kernel, {**signature, "out": f"*{name}"}, constants)
