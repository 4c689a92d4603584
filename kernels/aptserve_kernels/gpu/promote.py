"""Hidden states of one sequence turned into keys and values, in the units of its KV table.

The two products with the projection weights decide the time; the vendor's matrix library does them.
Around them stand a copy out of the pool (the tables share units, so a layer is read as a whole
before it is written) and one kernel that turns the keys and stores both, each byte once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from aptserve_kernels.batch import KeyProjection, LinearMap, Rotary
from aptserve_kernels.geometry import UnitGeometry
from aptserve_kernels.gpu.gather import gather_hidden
from aptserve_kernels.gpu.variants import DTYPES, HEAD_DIMS, KernelVariant
from aptserve_kernels.gpu.write import check_rows

_TILE_ELEMENTS = 1024


@triton.jit
def _rotated(
    keys,
    vectors,
    dims,
    mask,
    cos,
    sin,
    tokens,
    rotary_dim,
    interleaved: tl.constexpr,
):
    """Keys at ``vectors`` turned by position; ``keys`` are the same ones, already loaded.

    The partner of an element comes from memory a second time, that is from the first-level cache.
    """
    if interleaved:
        partner = dims ^ 1
        is_first = dims % 2 == 0
    else:
        is_first = dims < rotary_dim // 2
        partner = tl.where(is_first, dims + rotary_dim // 2, dims - rotary_dim // 2)
    turned = mask & (dims < rotary_dim)
    other = tl.load(vectors + partner, mask=turned, other=0.0).to(tl.float32)
    angles = tokens[:, None] * rotary_dim + dims
    # The model rounds its tables to the dtype of the keys, and its queries are turned by those.
    c = tl.load(cos + angles, mask=turned, other=1.0).to(keys.dtype).to(tl.float32)
    s = tl.load(sin + angles, mask=turned, other=0.0).to(keys.dtype).to(tl.float32)
    product = keys.to(tl.float32) * c + tl.where(is_first, -other, other) * s
    return tl.where(turned, product.to(keys.dtype), keys)


@triton.jit(do_not_specialize=["num_tokens"])
def _rotate_and_write_kernel(
    pool,
    k,
    v,
    table,
    cos,
    sin,
    num_tokens,
    num_kv_heads,
    heads_per_unit,
    block_size,
    rotary_dim,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    head_dim: tl.constexpr,
    tile_dim: tl.constexpr,
    tile_tokens: tl.constexpr,
    has_rotary: tl.constexpr,
    interleaved: tl.constexpr,
):
    """Program (tile of tokens, head)."""
    head = tl.program_id(1)
    num_tiles = tl.cdiv(block_size, tile_tokens)
    block = tl.program_id(0) // num_tiles
    offsets = tl.program_id(0) % num_tiles * tile_tokens + tl.arange(0, tile_tokens)
    tokens = (block * block_size + offsets).to(tl.int64)
    dims = tl.arange(0, tile_dim)[None, :]
    mask = ((offsets < block_size) & (tokens < num_tokens))[:, None] & (dims < head_dim)

    key_units = num_kv_heads // heads_per_unit
    entry = table + block * 2 * key_units + head // heads_per_unit
    place = head % heads_per_unit * block_size + offsets
    unit_rows = heads_per_unit * block_size

    vectors = k + (tokens * k_token_stride)[:, None] + head * k_head_stride
    keys = tl.load(vectors + dims, mask=mask, other=0.0)
    if has_rotary:
        keys = _rotated(keys, vectors, dims, mask, cos, sin, tokens, rotary_dim, interleaved)
    rows = tl.load(entry) * unit_rows + place
    tl.store(pool + rows[:, None] * head_dim + dims, keys, mask=mask)

    vectors = v + (tokens * v_token_stride)[:, None] + head * v_head_stride
    values = tl.load(vectors + dims, mask=mask, other=0.0)
    rows = tl.load(entry + key_units) * unit_rows + place
    tl.store(pool + rows[:, None] * head_dim + dims, values, mask=mask)


def promote(
    pool: Tensor,
    hidden_table: Tensor,
    kv_table: Tensor,
    num_tokens: int,
    key: KeyProjection,
    value: LinearMap,
    geometry: UnitGeometry,
) -> None:
    """As :func:`aptserve_kernels.promotion.promote`."""
    x = gather_hidden(pool, hidden_table, num_tokens, geometry)
    k = key.map(x).view(x.shape[0], -1, geometry.head_dim)
    if key.norm is not None:
        k = key.norm(k)
    v = value(x).view(x.shape[0], -1, geometry.head_dim)
    rotate_and_write(pool, k, v, kv_table, key.rotary, geometry)


def rotate_and_write(
    pool: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    rotary: Rotary | None,
    geometry: UnitGeometry,
) -> None:
    """Store a sequence from its first token on, keys turned by position.

    ``k``, ``v``: ``[num_tokens, num_kv_heads, head_dim]``, stride 1 in the last dimension;
    ``table``: ``[blocks, kv_units]``. ``pool`` and ``table`` are contiguous.
    """
    g, num_tokens = geometry, k.shape[0]
    _check(pool, k, v, table, rotary, g)
    if num_tokens == 0:
        return
    constants = _constants(g.head_dim, g.block_size)
    num_tiles = g.num_blocks(num_tokens) * triton.cdiv(g.block_size, constants["tile_tokens"])
    _rotate_and_write_kernel[(num_tiles, g.num_kv_heads)](
        pool=pool,
        k=k,
        v=v,
        table=table,
        cos=pool if rotary is None else rotary.cos,
        sin=pool if rotary is None else rotary.sin,
        num_tokens=num_tokens,
        num_kv_heads=g.num_kv_heads,
        heads_per_unit=g.heads_per_unit,
        block_size=g.block_size,
        rotary_dim=0 if rotary is None else rotary.cos.shape[-1],
        k_token_stride=k.stride(0),
        k_head_stride=k.stride(1),
        v_token_stride=v.stride(0),
        v_head_stride=v.stride(1),
        has_rotary=rotary is not None,
        interleaved=rotary is not None and rotary.interleaved,
        num_warps=4,
        **constants,
    )


def _check(
    pool: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    rotary: Rotary | None,
    geometry: UnitGeometry,
) -> None:
    g = geometry
    if not pool.is_contiguous() or pool.shape[1:] != (g.block_size, g.unit_width):
        raise ValueError("pool: not [num_units, block_size, unit_width] in one piece")
    if not table.is_contiguous() or table.dtype != torch.int64 or table.shape[1] != g.kv_units:
        raise ValueError(f"table: not int64 [blocks, {g.kv_units}] in one piece")
    if table.shape[0] < g.num_blocks(k.shape[0]):
        raise ValueError(f"table: {table.shape[0]} blocks do not hold {k.shape[0]} tokens")
    for name, tensor in (("k", k), ("v", v)):
        check_rows(name, tensor, pool.dtype)
        if tensor.shape != (k.shape[0], g.num_kv_heads, g.head_dim):
            raise ValueError(f"{name}: not [tokens, {g.num_kv_heads}, {g.head_dim}]")
    if rotary is not None:
        for name, tensor in (("cos", rotary.cos), ("sin", rotary.sin)):
            if not tensor.is_contiguous() or tensor.shape[-1] > g.head_dim:
                raise ValueError(f"{name}: not in one piece, or wider than a head")
            if tensor.shape[0] < k.shape[0]:
                raise ValueError(f"{name}: {tensor.shape[0]} positions, {k.shape[0]} tokens")


def _constants(head_dim: int, block_size: int) -> dict[str, int]:
    tile_dim = triton.next_power_of_2(head_dim)
    most = max(1, _TILE_ELEMENTS // tile_dim)
    return {
        "head_dim": head_dim,
        "tile_dim": tile_dim,
        "tile_tokens": min(most, triton.next_power_of_2(block_size)),
    }


def variants() -> Iterator[KernelVariant]:
    """Tables in float32, as models keep them; block sizes are multiples of a tile's tokens."""
    strides = ("k_token_stride", "k_head_stride", "v_token_stride", "v_head_stride")
    rotations = {"none": (False, False), "halves": (True, False), "pairs": (True, True)}
    for dtype in DTYPES.values():
        for head_dim in HEAD_DIMS:
            for rotation, (has_rotary, interleaved) in rotations.items():
                yield KernelVariant(
                    name=f"{dtype} head_dim={head_dim} rotary={rotation}",
                    kernel=_rotate_and_write_kernel,
                    signature={
                        **dict.fromkeys(("pool", "k", "v"), f"*{dtype}"),
                        **dict.fromkeys(("cos", "sin"), "*fp32" if has_rotary else f"*{dtype}"),
                        "table": "*i64",
                        **dict.fromkeys(("num_tokens", "num_kv_heads", "heads_per_unit"), "i32"),
                        **dict.fromkeys((*strides, "block_size", "rotary_dim"), "i32:16"),
                    },
                    constants={
                        **_constants(head_dim, 16),
                        "has_rotary": has_rotary,
                        "interleaved": interleaved,
                    },
                    num_warps=4,
                )
