"""What the attention kernels over keys and values share: addresses, scores, checks.

Inside a kernel scores are in units of log2, so that ``exp2`` takes them as they are, and an online
softmax (Milakov and Gimelshein, arXiv 1805.02867) starts from a finite maximum: what is masked is
-inf, and no difference of two infinities can arise.
"""

# ruff: noqa: N803  (constants of a kernel are in capitals)

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aptserve_kernels.batch import AttentionParams
from aptserve_kernels.geometry import UnitGeometry
from aptserve_kernels.gpu.variants import DTYPES, TARGETS
from aptserve_kernels.quantised import CODE_DTYPES, SCALE_DTYPE, codes_of

LOWEST = tl.constexpr(-1.0e30)
"""The maximum of no scores."""

LAYOUT_INTS = ("table_stride", "units_per_block", "heads_per_unit", "block_shift", "rows_per_unit")
"""What :func:`layout_arguments` gives beside tensors."""

CODES = {torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv"}
"""Dtypes of codes, by their names in a signature."""

FP8_TARGETS = ("sm_90", "sm_100")
"""Where e4m3 means what it does in torch: sm_80 has none, that of gfx942 has another bias."""

COMPILED_HEAD_DIMS = (64, 128, 256)
"""Head sizes that compile to something of their own; others are padded to the next."""

_NO_WINDOW = 2**30
_LOG2_E = 1.4426950408889634
_HEAD_DIM_MULTIPLE = 16
"""So that a vector of codes begins where a load of 16 bytes may."""
_STRIDE_MULTIPLE = 8
"""So that a vector of wider elements does."""
STRIDE_MULTIPLE = tl.constexpr(_STRIDE_MULTIPLE)


@triton.jit
def final_scores(products, scale, cap):
    """Scores from products of queries and keys; see :func:`score_arguments`."""
    scores = products * scale
    if cap > 0.0:
        # tanh y = 1 - 2 / (e^2y + 1), and exp2 gives e^2y; both ends are exact, none is NaN.
        scores = cap - 2.0 * cap / (tl.exp2(scores) + 1.0)
    return scores


@triton.jit
def unit_numbers(table, positions, seen, column, units_per_block, block_shift):
    """The unit of each position's block in one column of a sequence's table; 0 where not seen."""
    entries = (positions >> block_shift) * units_per_block + column
    return tl.load(table + entries, mask=seen, other=0)


@triton.jit
def load_vectors(start, offsets, seen, head_dim, BLOCK_D: tl.constexpr):
    """``[n, BLOCK_D]`` from ``[n]`` int64 offsets of elements; zeros where there is nothing."""
    dims = tl.arange(0, BLOCK_D)
    places = start + offsets[:, None] + dims[None, :]
    return tl.load(places, mask=seen[:, None] & (dims < head_dim)[None, :], other=0.0)


@triton.jit
def load_scales(scales, units, rows, seen, heads_per_unit, block_shift):
    """One float32 scale for each vector, ``rows`` being its row in its unit; 1 where not seen."""
    per_unit = 2 * heads_per_unit << block_shift
    return tl.load(scales + units * per_unit + rows, mask=seen, other=1.0).to(tl.float32)


@dataclass(frozen=True, slots=True)
class Codes:
    """The 8-bit form of a pool: what :mod:`aptserve_kernels.quantised` lays beside it."""

    scales: Tensor
    dtype: torch.dtype


def code_dtypes(dtype: torch.dtype, target: str) -> tuple[torch.dtype, ...]:
    """Dtypes of codes beside which a cache of ``dtype`` can stand on a target."""
    if dtype.itemsize != 2:
        return ()
    return CODE_DTYPES if target in FP8_TARGETS else (torch.int8,)


@cache
def target_of(device: torch.device) -> str:
    """The target whose launch configurations a device gets; of those not listed, the smallest."""
    if device.type != "cuda":
        return TARGETS[0]
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def score_arguments(params: AttentionParams) -> dict[str, Any]:
    """``score_scale``, ``score_cap`` and ``window`` of a kernel.

    Without a cap a score is the product times ``score_scale``. With one, that is the exponent of
    the exponential inside tanh, and ``score_cap`` is the cap, both in units of log2.
    """
    scale, cap = params.scaling * _LOG2_E, 0.0
    if params.softcap is not None:
        scale, cap = 2.0 * scale / params.softcap, params.softcap * _LOG2_E
    window = _NO_WINDOW if params.window is None else min(params.window, _NO_WINDOW)
    return {"score_scale": scale, "score_cap": cap, "window": window}


def layout_arguments(
    pool: Tensor, tables: Tensor, geometry: UnitGeometry, codes: Codes | None
) -> dict[str, Any]:
    """Where a kernel finds keys and values; ValueError unless they lie as the geometry says."""
    g = geometry
    units_per_block = g.kv_units if codes is None else g.key_units
    if pool.shape[1:] != (g.block_size, g.unit_width) or not pool.is_contiguous():
        raise ValueError("pool: contiguous [num_units, block_size, unit_width]")
    if g.block_size & (g.block_size - 1):
        raise ValueError("geometry: the block size must be a power of two")
    if tables.dtype is not torch.int64 or tables.dim() != 3 or tables.shape[2] != units_per_block:
        raise ValueError(f"tables: [sequences, max_blocks, {units_per_block}] int64")
    if tables.stride()[1:] != (units_per_block, 1):
        raise ValueError("tables: the entries of a sequence must be contiguous")
    rows_per_unit = g.heads_per_unit * g.block_size
    source = pool
    if codes is not None:
        _check_codes(pool, g, codes)
        rows_per_unit *= pool.element_size()
        source = pool.view(codes.dtype)
    return {
        "scales": None if codes is None else codes.scales,
        "pool": source,
        "tables": tables,
        "table_stride": tables.stride(0),
        "units_per_block": units_per_block,
        "heads_per_unit": g.heads_per_unit,
        "block_shift": g.block_size.bit_length() - 1,
        "rows_per_unit": rows_per_unit,
    }


def _check_codes(pool: Tensor, geometry: UnitGeometry, codes: Codes) -> None:
    if codes.dtype not in CODE_DTYPES:
        raise ValueError("code_dtype: int8 or float8_e4m3fn")
    if pool.element_size() != 2:
        raise ValueError("pool: bfloat16 or float16; codes are not for float32")
    if codes.scales.dtype is not SCALE_DTYPE or not codes.scales.is_contiguous():
        raise ValueError("scales: contiguous float16")
    if codes.scales.shape != codes_of(pool, geometry, codes.dtype).shape[:-1]:
        raise ValueError("scales: [num_units, 2, heads_per_unit, block_size]")


def check_vectors(name: str, x: Tensor, heads: int | None, head_dim: int) -> None:
    """ValueError unless ``x`` is ``[rows, heads, head_dim]`` that loads of 16 bytes can read."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}: bfloat16, float16 or float32")
    if x.dim() != 3 or x.shape[2] != head_dim or (heads is not None and x.shape[1] != heads):
        raise ValueError(f"{name}: [rows, {heads or 'heads'}, {head_dim}]")
    if x.stride(2) != 1:
        raise ValueError(f"{name}: the elements of a head must be neighbours")
    if head_dim % _HEAD_DIM_MULTIPLE or head_dim > COMPILED_HEAD_DIMS[-1]:
        raise ValueError(f"{name}: a head size of 16, 32 and so on to {COMPILED_HEAD_DIMS[-1]}")
    if x.stride(0) % _STRIDE_MULTIPLE or x.stride(1) % _STRIDE_MULTIPLE:
        raise ValueError(f"{name}: strides must be multiples of {_STRIDE_MULTIPLE}")


def check_queries(q: Tensor, pool: Tensor, geometry: UnitGeometry) -> int:
    """Query heads of each KV head; ValueError if they do not fit the pool."""
    check_vectors("q", q, None, geometry.head_dim)
    if q.dtype is not pool.dtype:
        raise ValueError("q: the dtype of the pool")
    if q.shape[1] % geometry.num_kv_heads:
        raise ValueError("q: a whole number of heads for each KV head")
    return q.shape[1] // geometry.num_kv_heads


def block_of(head_dim: int) -> int:
    """Elements that a tile takes for a head: the next of ``COMPILED_HEAD_DIMS``."""
    return next(size for size in COMPILED_HEAD_DIMS if size >= head_dim)


def dot_precision(dtype: torch.dtype) -> str:
    """float32 is multiplied as float32; other dtypes do not look at this."""
    return "ieee" if dtype is torch.float32 else "tf32"
