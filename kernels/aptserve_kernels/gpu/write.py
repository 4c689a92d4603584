"""Storing new tokens: keys, values and hidden states go to their slots in one launch.

Bound by the bytes moved, each read once and written once; at decode there are so few that the
launch itself decides, hence one for both tiers. A program copies ``_TILE_ELEMENTS`` of K and as
many of V, or a stretch of one hidden vector: eight elements a thread, neighbours in memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from aptserve_kernels.batch import WriteSlots
from aptserve_kernels.gpu.variants import DTYPES, HEAD_DIMS, KernelVariant

_TILE_ELEMENTS = 1024


@triton.jit
def _write_heads(
    pool,
    k,
    v,
    rows,
    key_slots,
    value_slots,
    first,
    num_vectors,
    num_heads,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    head_dim: tl.constexpr,
    tile_dim: tl.constexpr,
    tile_vectors: tl.constexpr,
    has_rows: tl.constexpr,
):
    vectors = first + tl.arange(0, tile_vectors)
    exists = vectors < num_vectors
    key_slot = tl.load(key_slots + vectors, mask=exists, other=-1)
    value_slot = tl.load(value_slots + vectors, mask=exists, other=-1)
    row = (vectors // num_heads).to(tl.int64)
    if has_rows:
        row = tl.load(rows + row, mask=exists, other=0)
    head = (vectors % num_heads).to(tl.int64)
    dims = tl.arange(0, tile_dim)[None, :]

    key_mask = (key_slot >= 0)[:, None] & (dims < head_dim)
    source = k + (row * k_row_stride + head * k_head_stride)[:, None] + dims
    keys = tl.load(source, mask=key_mask, other=0.0)
    tl.store(pool + key_slot[:, None] * head_dim + dims, keys, mask=key_mask)

    value_mask = (value_slot >= 0)[:, None] & (dims < head_dim)
    source = v + (row * v_row_stride + head * v_head_stride)[:, None] + dims
    values = tl.load(source, mask=value_mask, other=0.0)
    tl.store(pool + value_slot[:, None] * head_dim + dims, values, mask=value_mask)


@triton.jit
def _write_hidden(
    pool,
    x,
    rows,
    slots,
    program,
    num_units,
    unit_width,
    x_row_stride,
    tile_width: tl.constexpr,
    has_rows: tl.constexpr,
):
    num_tiles = tl.cdiv(unit_width, tile_width)
    vector = program // num_tiles
    columns = program % num_tiles * tile_width + tl.arange(0, tile_width)
    slot = tl.load(slots + vector)
    row = (vector // num_units).to(tl.int64)
    if has_rows:
        row = tl.load(rows + row)
    mask = (columns < unit_width) & (slot >= 0)
    source = x + row * x_row_stride + vector % num_units * unit_width + columns
    tl.store(pool + slot * unit_width + columns, tl.load(source, mask=mask, other=0.0), mask=mask)


# Counts change from step to step; specialising on them would compile in the middle of serving.
@triton.jit(do_not_specialize=["num_kv_vectors", "num_kv_programs"])
def _write_cache_kernel(
    pool,
    k,
    v,
    x,
    kv_rows,
    key_slots,
    value_slots,
    hidden_rows,
    hidden_slots,
    num_kv_vectors,
    num_kv_programs,
    num_heads,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    num_units,
    unit_width,
    x_row_stride,
    head_dim: tl.constexpr,
    tile_dim: tl.constexpr,
    tile_vectors: tl.constexpr,
    tile_width: tl.constexpr,
    has_kv_rows: tl.constexpr,
    has_hidden_rows: tl.constexpr,
):
    """Programs ``[0, num_kv_programs)`` store keys and values, the others hidden states."""
    program = tl.program_id(0)
    if program < num_kv_programs:
        _write_heads(
            pool,
            k,
            v,
            kv_rows,
            key_slots,
            value_slots,
            program * tile_vectors,
            num_kv_vectors,
            num_heads,
            k_row_stride,
            k_head_stride,
            v_row_stride,
            v_head_stride,
            head_dim,
            tile_dim,
            tile_vectors,
            has_kv_rows,
        )
    else:
        _write_hidden(
            pool,
            x,
            hidden_rows,
            hidden_slots,
            program - num_kv_programs,
            num_units,
            unit_width,
            x_row_stride,
            tile_width,
            has_hidden_rows,
        )


def write_cache(pool: Tensor, k: Tensor, v: Tensor, x: Tensor | None, slots: WriteSlots) -> None:
    """As :func:`aptserve_kernels.reference.write_cache`; a negative slot stores nothing.

    ``pool`` and the slots are contiguous; ``k``, ``v`` and ``x`` have stride 1 in their last
    dimension. All of one dtype. Raises ValueError otherwise.
    """
    num_kv, num_hidden = slots.key_slots.numel(), slots.hidden_slots.numel()
    _check(pool, k, v, x, slots)
    states = pool if x is None else x
    unit_width = pool.shape[-1]
    constants = _constants(k.shape[-1])
    num_kv_programs = triton.cdiv(num_kv, constants["tile_vectors"])
    num_programs = num_kv_programs + num_hidden * triton.cdiv(unit_width, constants["tile_width"])
    if num_programs == 0:
        return
    _write_cache_kernel[(num_programs,)](
        pool=pool,
        k=k,
        v=v,
        x=states,
        kv_rows=slots.key_slots if slots.kv_rows is None else slots.kv_rows,
        key_slots=slots.key_slots,
        value_slots=slots.value_slots,
        hidden_rows=slots.hidden_slots if slots.hidden_rows is None else slots.hidden_rows,
        hidden_slots=slots.hidden_slots,
        num_kv_vectors=num_kv,
        num_kv_programs=num_kv_programs,
        num_heads=k.shape[1],
        k_row_stride=k.stride(0),
        k_head_stride=k.stride(1),
        v_row_stride=v.stride(0),
        v_head_stride=v.stride(1),
        num_units=states.shape[-1] // unit_width,
        unit_width=unit_width,
        x_row_stride=states.stride(0),
        has_kv_rows=slots.kv_rows is not None,
        has_hidden_rows=slots.hidden_rows is not None,
        num_warps=4,
        **constants,
    )


def _check(pool: Tensor, k: Tensor, v: Tensor, x: Tensor | None, slots: WriteSlots) -> None:
    if not pool.is_contiguous():
        raise ValueError("pool: not contiguous")
    if slots.key_slots.numel():
        if slots.key_slots.shape != slots.value_slots.shape:
            raise ValueError("slots: not as many for values as for keys")
        if slots.kv_rows is None and k.shape[0] * k.shape[1] != slots.key_slots.numel():
            raise ValueError("slots: not one per row and KV head")
        for name, tensor in (("k", k), ("v", v)):
            check_rows(name, tensor, pool.dtype)
    if slots.hidden_slots.numel():
        if x is None:
            raise ValueError("x: hidden rows need the layer input")
        check_rows("x", x, pool.dtype)
        if x.shape[-1] % pool.shape[-1]:
            raise ValueError("x: no whole number of units wide")


def check_rows(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """ValueError unless ``tensor`` is of ``dtype`` and its last dimension has stride 1."""
    if tensor.dtype != dtype:
        raise ValueError(f"{name}: {tensor.dtype} where the pool holds {dtype}")
    if tensor.stride(-1) != 1:
        raise ValueError(f"{name}: the last dimension has stride {tensor.stride(-1)}")


def _constants(head_dim: int) -> dict[str, int]:
    tile_dim = triton.next_power_of_2(head_dim)
    return {
        "head_dim": head_dim,
        "tile_dim": tile_dim,
        "tile_vectors": max(1, _TILE_ELEMENTS // tile_dim),
        "tile_width": _TILE_ELEMENTS,
    }


def variants() -> Iterator[KernelVariant]:
    """With all rows in one tier, and with rows chosen for each."""
    pointers = ("kv_rows", "key_slots", "value_slots", "hidden_rows", "hidden_slots")
    strides = ("k_row_stride", "k_head_stride", "v_row_stride", "v_head_stride", "x_row_stride")
    for dtype in DTYPES.values():
        for head_dim in HEAD_DIMS:
            for has_rows in (False, True):
                yield KernelVariant(
                    name=f"{dtype} head_dim={head_dim} rows={'chosen' if has_rows else 'all'}",
                    kernel=_write_cache_kernel,
                    signature={
                        **dict.fromkeys(("pool", "k", "v", "x"), f"*{dtype}"),
                        **dict.fromkeys(pointers, "*i64"),
                        **dict.fromkeys(("num_kv_vectors", "num_kv_programs"), "i32"),
                        **dict.fromkeys(("num_heads", "num_units"), "i32"),
                        **dict.fromkeys((*strides, "unit_width"), "i32:16"),
                    },
                    constants={
                        **_constants(head_dim),
                        "has_kv_rows": has_rows,
                        "has_hidden_rows": has_rows,
                    },
                    num_warps=4,
                )
