"""A copy of one sequence's hidden states in token order, for prefill over them and for promotion.

Bound by the bytes moved, each read once and written once. A program copies a tile of one unit, up
to 8 tokens by 256 elements.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from aptserve_kernels.geometry import UnitGeometry
from aptserve_kernels.gpu.variants import DTYPES, KernelVariant

_TILE_WIDTH = 256


@triton.jit(do_not_specialize=["num_tokens"])
def _gather_kernel(
    pool,
    table,
    out,
    num_tokens,
    num_units,
    unit_width,
    block_size,
    tile_tokens: tl.constexpr,
    tile_width: tl.constexpr,
):
    """Program (tile of tokens, unit of the block, tile of columns)."""
    unit_index = tl.program_id(1)
    num_tiles = tl.cdiv(block_size, tile_tokens)
    block = tl.program_id(0) // num_tiles
    offsets = tl.program_id(0) % num_tiles * tile_tokens + tl.arange(0, tile_tokens)
    tokens = (block * block_size + offsets).to(tl.int64)
    unit = tl.load(table + block * num_units + unit_index)

    columns = (tl.program_id(2) * tile_width + tl.arange(0, tile_width))[None, :]
    mask = ((offsets < block_size) & (tokens < num_tokens))[:, None] & (columns < unit_width)
    source = (unit * block_size + offsets)[:, None] * unit_width + columns
    copied = tl.load(pool + source, mask=mask, other=0.0)
    target = (tokens * num_units + unit_index)[:, None] * unit_width + columns
    tl.store(out + target, copied, mask=mask)


def gather_hidden(pool: Tensor, table: Tensor, num_tokens: int, geometry: UnitGeometry) -> Tensor:
    """As :func:`aptserve_kernels.reference.gather_hidden`; ``pool``, ``table`` contiguous."""
    g = geometry
    _check(pool, table, g)
    num_tokens = min(num_tokens, table.shape[0] * g.block_size)
    out = torch.empty((num_tokens, g.hidden_size), dtype=pool.dtype, device=pool.device)
    if num_tokens > 0:
        constants = _constants(g.block_size)
        num_tiles = g.num_blocks(num_tokens) * triton.cdiv(g.block_size, constants["tile_tokens"])
        grid = (num_tiles, g.hidden_units, triton.cdiv(g.unit_width, _TILE_WIDTH))
        _gather_kernel[grid](
            pool=pool,
            table=table,
            out=out,
            num_tokens=num_tokens,
            num_units=g.hidden_units,
            unit_width=g.unit_width,
            block_size=g.block_size,
            num_warps=4,
            **constants,
        )
    return out


def _check(pool: Tensor, table: Tensor, geometry: UnitGeometry) -> None:
    g = geometry
    if not pool.is_contiguous() or pool.shape[1:] != (g.block_size, g.unit_width):
        raise ValueError("pool: not [num_units, block_size, unit_width] in one piece")
    if not table.is_contiguous() or table.dtype != torch.int64:
        raise ValueError("table: not int64 in one piece")
    if table.shape[1] != g.hidden_units:
        raise ValueError(f"table: {table.shape[1]} units per block, not {g.hidden_units}")


def _constants(block_size: int) -> dict[str, int]:
    return {
        "tile_tokens": min(8, triton.next_power_of_2(block_size)),
        "tile_width": _TILE_WIDTH,
    }


def variants() -> Iterator[KernelVariant]:
    """All block sizes that ship are multiples of a tile's tokens and compile to the same."""
    for dtype in DTYPES.values():
        yield KernelVariant(
            name=dtype,
            kernel=_gather_kernel,
            signature={
                "pool": f"*{dtype}",
                "table": "*i64",
                "out": f"*{dtype}",
                **dict.fromkeys(("num_tokens", "num_units"), "i32"),
                **dict.fromkeys(("unit_width", "block_size"), "i32:16"),
            },
            constants=_constants(16),
            num_warps=4,
        )
