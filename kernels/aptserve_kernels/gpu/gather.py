"""Copies of one sequence's cache in token order, for prefill over a context and for promotion.

Bound by the bytes moved, each read once and written once. A program copies a tile of one unit: for
keys and values up to 16 tokens of one head, which are one run of the pool; for hidden states up to
8 tokens by 256 elements.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from aptserve_kernels.geometry import UnitGeometry
from aptserve_kernels.gpu.variants import DTYPES, HEAD_DIMS, KernelVariant

_TILE_WIDTH = 256


@triton.jit(do_not_specialize=["num_tokens"])
def _gather_kv_kernel(
    pool,
    table,
    out,
    num_tokens,
    num_kv_heads,
    heads_per_unit,
    block_size,
    head_dim: tl.constexpr,
    tile_dim: tl.constexpr,
    tile_tokens: tl.constexpr,
):
    """Program (tile, head, 0 for keys or 1 for values)."""
    head, which = tl.program_id(1), tl.program_id(2)
    num_tiles = tl.cdiv(block_size, tile_tokens)
    block = tl.program_id(0) // num_tiles
    offsets = tl.program_id(0) % num_tiles * tile_tokens + tl.arange(0, tile_tokens)
    tokens = (block * block_size + offsets).to(tl.int64)
    key_units = num_kv_heads // heads_per_unit
    unit = tl.load(table + (block * 2 + which) * key_units + head // heads_per_unit)

    dims = tl.arange(0, tile_dim)[None, :]
    mask = ((offsets < block_size) & (tokens < num_tokens))[:, None] & (dims < head_dim)
    rows = (unit * heads_per_unit + head % heads_per_unit) * block_size + offsets
    copied = tl.load(pool + rows[:, None] * head_dim + dims, mask=mask, other=0.0)
    rows = (which * num_tokens.to(tl.int64) + tokens) * num_kv_heads + head
    tl.store(out + rows[:, None] * head_dim + dims, copied, mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _gather_hidden_kernel(
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


def gather_kv(
    pool: Tensor, table: Tensor, num_tokens: int, geometry: UnitGeometry
) -> tuple[Tensor, Tensor]:
    """As :func:`aptserve_kernels.reference.gather_kv`; ``pool``, ``table`` contiguous."""
    g = geometry
    _check(pool, table, g.kv_units, g)
    num_tokens = min(num_tokens, table.shape[0] * g.block_size)
    out = torch.empty(
        (2, num_tokens, g.num_kv_heads, g.head_dim), dtype=pool.dtype, device=pool.device
    )
    if num_tokens > 0:
        constants = _kv_constants(g.head_dim, g.block_size)
        num_tiles = g.num_blocks(num_tokens) * triton.cdiv(g.block_size, constants["tile_tokens"])
        _gather_kv_kernel[(num_tiles, g.num_kv_heads, 2)](
            pool=pool,
            table=table,
            out=out,
            num_tokens=num_tokens,
            num_kv_heads=g.num_kv_heads,
            heads_per_unit=g.heads_per_unit,
            block_size=g.block_size,
            num_warps=4,
            **constants,
        )
    return out[0], out[1]


def gather_hidden(pool: Tensor, table: Tensor, num_tokens: int, geometry: UnitGeometry) -> Tensor:
    """As :func:`aptserve_kernels.reference.gather_hidden`; ``pool``, ``table`` contiguous."""
    g = geometry
    _check(pool, table, g.hidden_units, g)
    num_tokens = min(num_tokens, table.shape[0] * g.block_size)
    out = torch.empty((num_tokens, g.hidden_size), dtype=pool.dtype, device=pool.device)
    if num_tokens > 0:
        constants = _hidden_constants(g.block_size)
        num_tiles = g.num_blocks(num_tokens) * triton.cdiv(g.block_size, constants["tile_tokens"])
        grid = (num_tiles, g.hidden_units, triton.cdiv(g.unit_width, _TILE_WIDTH))
        _gather_hidden_kernel[grid](
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


def _check(pool: Tensor, table: Tensor, units_per_block: int, geometry: UnitGeometry) -> None:
    if not pool.is_contiguous() or pool.shape[1:] != (geometry.block_size, geometry.unit_width):
        raise ValueError("pool: not [num_units, block_size, unit_width] in one piece")
    if not table.is_contiguous() or table.dtype != torch.int64:
        raise ValueError("table: not int64 in one piece")
    if table.shape[1] != units_per_block:
        raise ValueError(f"table: {table.shape[1]} units per block, not {units_per_block}")


def _kv_constants(head_dim: int, block_size: int) -> dict[str, int]:
    return {
        "head_dim": head_dim,
        "tile_dim": triton.next_power_of_2(head_dim),
        "tile_tokens": min(16, triton.next_power_of_2(block_size)),
    }


def _hidden_constants(block_size: int) -> dict[str, int]:
    return {
        "tile_tokens": min(8, triton.next_power_of_2(block_size)),
        "tile_width": _TILE_WIDTH,
    }


def variants() -> Iterator[KernelVariant]:
    """All block sizes that ship are multiples of a tile's tokens and compile to the same."""
    for dtype in DTYPES.values():
        tensors = {"pool": f"*{dtype}", "table": "*i64", "out": f"*{dtype}", "num_tokens": "i32"}
        for head_dim in HEAD_DIMS:
            yield KernelVariant(
                name=f"{dtype} head_dim={head_dim}",
                kernel=_gather_kv_kernel,
                signature={
                    **tensors,
                    **dict.fromkeys(("num_kv_heads", "heads_per_unit"), "i32"),
                    "block_size": "i32:16",
                },
                constants=_kv_constants(head_dim, 16),
                num_warps=4,
            )
        yield KernelVariant(
            name=dtype,
            kernel=_gather_hidden_kernel,
            signature={
                **tensors,
                "num_units": "i32",
                **dict.fromkeys(("unit_width", "block_size"), "i32:16"),
            },
            constants=_hidden_constants(16),
            num_warps=4,
        )
