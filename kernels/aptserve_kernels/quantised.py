"""The 8-bit tier: keys and values as codes with one scale per token and head, in torch.

A block takes ``key_units`` units, half of what plain keys and values take. Unit j of a block, seen
as bytes, begins with ``[2, heads_per_unit, block_size, head_dim]`` codes: first the keys, then the
values, of the heads whose keys unit j of the KV tier would hold. The scales stand beside the pool,
``[num_units, 2, heads_per_unit, block_size]`` float16 per layer, so that a unit's size does not
depend on whether the tier is in use.

A value is ``code * scale``. The scale is the largest magnitude of the head's vector over the
largest code, rounded to float16 before the codes are made, so that rounding it costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aptserve_kernels.geometry import UnitGeometry

SCALE_DTYPE = torch.float16
CODE_DTYPES = (torch.int8, torch.float8_e4m3fn)

_SMALLEST_SCALE = 2.0**-14
"""The smallest normal float16; a vector of zeros must not divide by zero."""


def largest_code(dtype: torch.dtype) -> float:
    """127 for int8, 448 for e4m3."""
    return 127.0 if dtype is torch.int8 else torch.finfo(dtype).max


def new_scales(num_units: int, geometry: UnitGeometry, device: torch.device) -> Tensor:
    """The scales of one layer's pool, zeros."""
    shape = (num_units, 2, geometry.heads_per_unit, geometry.block_size)
    return torch.zeros(shape, dtype=SCALE_DTYPE, device=device)


def scale_bytes(geometry: UnitGeometry) -> int:
    """Bytes of the scales of one unit in one layer."""
    return 2 * geometry.heads_per_unit * geometry.block_size * SCALE_DTYPE.itemsize


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes ``[..., head_dim]`` of ``dtype`` and scales ``[...]`` of ``x`` ``[..., head_dim]``."""
    wide, limit = x.float(), largest_code(dtype)
    scales = (wide.abs().amax(-1) / limit).clamp_min(_SMALLEST_SCALE).to(SCALE_DTYPE)
    codes = (wide / scales.float().unsqueeze(-1)).clamp(-limit, limit)
    # torch rounds half to even, and so does a GPU's conversion.
    return (codes.round() if dtype is torch.int8 else codes).to(dtype), scales


def codes_of(pool: Tensor, geometry: UnitGeometry, dtype: torch.dtype) -> Tensor:
    """The pool as codes ``[num_units, 2, heads_per_unit, block_size, head_dim]``; a view."""
    g = geometry
    num_units = pool.shape[0]
    used = 2 * g.heads_per_unit * g.block_size * g.head_dim
    return (
        pool.view(dtype)
        .view(num_units, -1)[:, :used]
        .view(num_units, 2, g.heads_per_unit, g.block_size, g.head_dim)
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
    """Store new tokens as codes.

    ``pool``: ``[num_units, block_size, unit_width]`` of a dtype of two bytes or more; ``k``, ``v``:
    ``[rows, num_kv_heads, head_dim]``; ``slots``: ``[rows * num_kv_heads]`` int64, as
    :func:`aptserve_kernels.index.head_rows` numbers them, -1 where nothing is to be stored.
    """
    g = geometry
    chosen = slots >= 0
    slots = slots[chosen]
    offsets = slots % g.block_size
    heads = slots // g.block_size % g.heads_per_unit
    units = slots // (g.block_size * g.heads_per_unit)
    codes = codes_of(pool, g, dtype)
    for which, x in enumerate((k, v)):
        made, made_scales = quantise(x.reshape(-1, g.head_dim)[chosen], dtype)
        codes[units, which, heads, offsets] = made
        scales[units, which, heads, offsets] = made_scales


def gather_kv8(
    pool: Tensor,
    scales: Tensor,
    table: Tensor,
    num_tokens: int,
    geometry: UnitGeometry,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """K and V, each ``[num_tokens, num_kv_heads, head_dim]`` in the pool's dtype.

    ``table``: ``[blocks, key_units]``.
    """
    g = geometry
    codes = codes_of(pool, g, dtype)[table]  # [blocks, key_units, 2, heads, block_size, head_dim]
    wide = codes.float() * scales[table].float().unsqueeze(-1)
    ordered = wide.permute(2, 0, 4, 1, 3, 5).reshape(2, -1, g.num_kv_heads, g.head_dim)
    k, v = ordered[:, :num_tokens].to(pool.dtype)
    return k, v
