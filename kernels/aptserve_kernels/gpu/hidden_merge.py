"""Weights of tiles from products of queries and keys that were computed in parts.

Reads 4 bytes per head, token and part, and writes the weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from aptserve_kernels.batch import AttentionParams, DecodeBatch
from aptserve_kernels.gpu.hidden_tiles import TILES, TileWeights, store_tile, tokens_of, window_of
from aptserve_kernels.gpu.variants import DTYPES, KernelVariant

_TILE_HEADS = 4
_COUNTS = ("num_heads", "tiles", "num_parts", "window")


@triton.jit(do_not_specialize=_COUNTS)
def _merge_kernel(
    partials,
    lengths,
    weights,
    maxima,
    sums,
    num_heads,
    tiles,
    num_parts,
    window,
    scaling,
    softcap,
    tile_tokens: tl.constexpr,
    tile_heads: tl.constexpr,
):
    tile, head_tiles = tl.program_id(1), tl.cdiv(num_heads, tile_heads)
    sequence = (tl.program_id(0) // head_tiles).to(tl.int64)
    heads = tl.program_id(0) % head_tiles * tile_heads + tl.arange(0, tile_heads)
    tokens, seen, is_unseen = tokens_of(lengths, sequence, tile, window, tile_tokens)
    if is_unseen:
        return
    row_size = tiles * tile_tokens
    rows = sequence * num_heads + heads
    places = rows[None, :] * row_size + tokens[:, None]
    mask = seen[:, None] & (heads < num_heads)[None, :]
    num_rows = (tl.num_programs(0) // head_tiles).to(tl.int64) * num_heads
    products = tl.zeros((tile_tokens, tile_heads), tl.float32)
    for part in range(num_parts):
        products += tl.load(partials + part * num_rows * row_size + places, mask=mask, other=0.0)
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


def merge_products(
    partials: Tensor, into: TileWeights, batch: DecodeBatch, params: AttentionParams
) -> None:
    """Fill ``into`` from partial products ``[parts, batch, heads, tokens]`` in float32.

    Tokens as in ``into.weights``; what stands at tokens that are not visible is not used.
    """
    num_parts, num_sequences, num_heads, _ = partials.shape
    _merge_kernel[(num_sequences * -(-num_heads // _TILE_HEADS), into.num_tiles)](
        partials=partials,
        lengths=batch.lengths,
        weights=into.weights,
        maxima=into.maxima,
        sums=into.sums,
        num_heads=num_heads,
        tiles=into.num_tiles,
        num_parts=num_parts,
        window=window_of(params),
        scaling=float(params.scaling),
        softcap=params.softcap or 0.0,
        tile_tokens=into.tile,
        tile_heads=_TILE_HEADS,
        num_warps=4,
        num_stages=2,
    )


def variants() -> Iterator[KernelVariant]:
    """Every dtype and size of a tile."""
    signature = {
        **dict.fromkeys(("partials", "maxima", "sums"), "*fp32"),
        "lengths": "*i64",
        **dict.fromkeys(_COUNTS, "i32"),
        **dict.fromkeys(("scaling", "softcap"), "fp32"),
    }
    for name in DTYPES.values():
        for tile in TILES:
            yield KernelVariant(
                f"{name}-tile{tile}",
                _merge_kernel,
                {**signature, "weights": f"*{name}"},
                {"tile_tokens": tile, "tile_heads": _TILE_HEADS},
            )
