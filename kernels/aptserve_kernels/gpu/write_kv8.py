"""Storing new tokens in the 8-bit tier: codes and scales made and placed in one launch.

Bound by the bytes of K and V, read once; codes are half of them or less. A program holds the
vectors of a few (token, head) pairs in registers, so that the largest magnitude, the scale and the
codes need no second look at memory. The codes equal those of :mod:`aptserve_kernels.quantised` bit
for bit: divisions are rounded as IEEE 754 asks, which those of Triton's ``/`` are not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from aptserve_kernels.geometry import UnitGeometry
from aptserve_kernels.gpu.tiles import CODES, FP8_TARGETS
from aptserve_kernels.gpu.variants import DTYPES, HEAD_DIMS, TARGETS, KernelVariant
from aptserve_kernels.gpu.write import check_rows
from aptserve_kernels.quantised import CODE_DTYPES, SCALE_DTYPE, largest_code

_TILE_ELEMENTS = 1024
_SMALLEST_SCALE = tl.constexpr(2.0**-14)
_ROUNDING = tl.constexpr(1.5 * 2.0**23)
"""Added and taken away again, it leaves a float32 below 2^22 rounded to whole, half to even."""


@triton.jit
def _store_quantised(
    x,
    vectors,
    exists,
    codes,
    code_starts,
    scales,
    scale_places,
    largest: tl.constexpr,
    head_dim: tl.constexpr,
    tile_dim: tl.constexpr,
):
    dims = tl.arange(0, tile_dim)[None, :]
    mask = exists[:, None] & (dims < head_dim)
    wide = tl.load(x + vectors[:, None] + dims, mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(wide), 1), largest), _SMALLEST_SCALE)
    # A maximum passes over NaN; the vector must not come out sound.
    has_nan = tl.max((wide != wide).to(tl.int32), 1) > 0
    scale = tl.where(has_nan, float("nan"), scale).to(tl.float16)
    tl.store(scales + scale_places, scale, mask=exists)

    made = tl.div_rn(wide, scale.to(tl.float32)[:, None])
    made = tl.minimum(tl.maximum(made, -largest), largest)
    if codes.dtype.element_ty == tl.int8:
        made = (made + _ROUNDING) - _ROUNDING
    tl.store(codes + code_starts[:, None] + dims, made.to(codes.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_vectors"])
def _write_kv8_kernel(
    codes,
    scales,
    k,
    v,
    slots,
    num_vectors,
    num_heads,
    head_rows_per_unit,
    unit_bytes,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    largest: tl.constexpr,
    head_dim: tl.constexpr,
    tile_dim: tl.constexpr,
    tile_vectors: tl.constexpr,
):
    """``head_rows_per_unit`` is heads_per_unit * block_size: codes of the keys of one unit."""
    pairs = tl.program_id(0) * tile_vectors + tl.arange(0, tile_vectors)
    slot = tl.load(slots + pairs, mask=pairs < num_vectors, other=-1)
    exists = slot >= 0
    row, head = (pairs // num_heads).to(tl.int64), pairs % num_heads
    unit, place = slot // head_rows_per_unit, slot % head_rows_per_unit
    code_start = unit * unit_bytes + place * head_dim
    scale_place = unit * 2 * head_rows_per_unit + place
    _store_quantised(
        k,
        row * k_row_stride + head * k_head_stride,
        exists,
        codes,
        code_start,
        scales,
        scale_place,
        largest,
        head_dim,
        tile_dim,
    )
    _store_quantised(
        v,
        row * v_row_stride + head * v_head_stride,
        exists,
        codes,
        code_start + head_rows_per_unit * head_dim,
        scales,
        scale_place + head_rows_per_unit,
        largest,
        head_dim,
        tile_dim,
    )


def write_kv8(
    pool: Tensor,
    scales: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    geometry: UnitGeometry,
    dtype: torch.dtype,
) -> None:
    """As :func:`aptserve_kernels.quantised.write_kv8`.

    ``pool``, ``scales`` and ``slots`` are contiguous; ``k`` and ``v`` have stride 1 in their last
    dimension and the pool's dtype. Raises ValueError otherwise.
    """
    g, num_vectors = geometry, slots.numel()
    _check(pool, scales, k, v, slots, g, dtype)
    if num_vectors == 0:
        return
    constants = _constants(g.head_dim, dtype)
    _write_kv8_kernel[(triton.cdiv(num_vectors, constants["tile_vectors"]),)](
        codes=pool.view(dtype),
        scales=scales,
        k=k,
        v=v,
        slots=slots,
        num_vectors=num_vectors,
        num_heads=g.num_kv_heads,
        head_rows_per_unit=g.heads_per_unit * g.block_size,
        unit_bytes=g.unit_elements * pool.element_size(),
        k_row_stride=k.stride(0),
        k_head_stride=k.stride(1),
        v_row_stride=v.stride(0),
        v_head_stride=v.stride(1),
        num_warps=4,
        **constants,
    )


def _check(
    pool: Tensor,
    scales: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    geometry: UnitGeometry,
    dtype: torch.dtype,
) -> None:
    g = geometry
    if dtype not in CODE_DTYPES:
        raise ValueError(f"dtype: no codes of {dtype}")
    if not pool.is_contiguous() or pool.shape[1:] != (g.block_size, g.unit_width):
        raise ValueError("pool: not [num_units, block_size, unit_width] in one piece")
    if pool.element_size() < 2:
        raise ValueError(f"pool: its units of {pool.dtype} do not hold two codes per element")
    shape = (pool.shape[0], 2, g.heads_per_unit, g.block_size)
    if not scales.is_contiguous() or scales.shape != shape or scales.dtype != SCALE_DTYPE:
        raise ValueError(f"scales: not {SCALE_DTYPE} {shape} in one piece")
    for name, tensor in (("k", k), ("v", v)):
        check_rows(name, tensor, pool.dtype)
        if tensor.shape[1:] != (g.num_kv_heads, g.head_dim):
            raise ValueError(f"{name}: not [rows, {g.num_kv_heads}, {g.head_dim}]")
    if not slots.is_contiguous() or slots.numel() != k.shape[0] * g.num_kv_heads:
        raise ValueError("slots: not one per row and KV head, in one piece")


def _constants(head_dim: int, dtype: torch.dtype) -> dict[str, float]:
    tile_dim = triton.next_power_of_2(head_dim)
    return {
        "largest": largest_code(dtype),
        "head_dim": head_dim,
        "tile_dim": tile_dim,
        "tile_vectors": max(1, _TILE_ELEMENTS // tile_dim),
    }


def variants() -> Iterator[KernelVariant]:
    """Every dtype of cache and codes at every head size."""
    strides = ("k_row_stride", "k_head_stride", "v_row_stride", "v_head_stride")
    for dtype in DTYPES.values():
        for code_dtype in CODE_DTYPES:
            for head_dim in HEAD_DIMS:
                yield KernelVariant(
                    name=f"{dtype} codes={CODES[code_dtype]} head_dim={head_dim}",
                    kernel=_write_kv8_kernel,
                    signature={
                        "codes": f"*{CODES[code_dtype]}",
                        "scales": "*fp16",
                        **dict.fromkeys(("k", "v"), f"*{dtype}"),
                        "slots": "*i64",
                        **dict.fromkeys(("num_vectors", "num_heads"), "i32"),
                        **dict.fromkeys((*strides, "head_rows_per_unit", "unit_bytes"), "i32:16"),
                    },
                    constants=_constants(head_dim, code_dtype),
                    num_warps=4,
                    targets=TARGETS if code_dtype is torch.int8 else FP8_TARGETS,
                )
