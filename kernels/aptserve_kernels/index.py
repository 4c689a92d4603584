"""Row numbers of cached vectors in a pool, from block tables and positions."""

from __future__ import annotations

import torch
from torch import Tensor

from aptserve_kernels.geometry import UnitGeometry


def head_rows(units: Tensor, offsets: Tensor, geometry: UnitGeometry) -> Tensor:
    """Rows of ``pool.view(-1, head_dim)`` that hold a token's keys (or values).

    ``units``: ``[..., key_units]`` of the token's block, ``offsets``: ``[...]`` inside the block.
    Returns ``[..., num_kv_heads]``.
    """
    heads = torch.arange(geometry.num_kv_heads, device=units.device)
    per_unit = geometry.heads_per_unit
    base = units * (per_unit * geometry.block_size)
    if geometry.key_units > 1:
        base = base.index_select(-1, heads // per_unit)
    return base + (heads % per_unit) * geometry.block_size + offsets.unsqueeze(-1)


def hidden_rows(units: Tensor, offsets: Tensor, geometry: UnitGeometry) -> Tensor:
    """Rows of ``pool.view(-1, unit_width)`` that hold a token's hidden state.

    ``units``: ``[..., hidden_units]``, ``offsets``: ``[...]``. Returns ``[..., hidden_units]``.
    """
    return units * geometry.block_size + offsets.unsqueeze(-1)


def split_kv(units: Tensor, geometry: UnitGeometry) -> tuple[Tensor, Tensor]:
    """The K part and the V part of ``[..., kv_units]``."""
    return units[..., : geometry.key_units], units[..., geometry.key_units :]


def kv_slots(units: Tensor, offsets: Tensor, geometry: UnitGeometry) -> tuple[Tensor, Tensor]:
    """Key and value rows of tokens at ``offsets`` in blocks ``units`` ``[tokens, kv_units]``.

    Each flat, one per (token, KV head): see :class:`aptserve_kernels.batch.WriteSlots`.
    """
    key_units, value_units = split_kv(units, geometry)
    return (
        head_rows(key_units, offsets, geometry).view(-1),
        head_rows(value_units, offsets, geometry).view(-1),
    )
