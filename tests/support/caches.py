"""Builders of paged caches with known content."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from aptserve_kernels import DecodeBatch, UnitGeometry, WriteSlots
from aptserve_kernels.index import head_rows, hidden_rows, split_kv
from torch import Tensor


def make_geometry(
    *, heads: int = 4, head_dim: int = 8, hidden: int | None = None, block_size: int = 4
) -> UnitGeometry:
    return UnitGeometry.of(
        block_size=block_size,
        num_kv_heads=heads,
        head_dim=head_dim,
        hidden_size=heads * head_dim if hidden is None else hidden,
    )


@dataclass
class PagedCache:
    """A NaN-filled pool and tables of shuffled units for sequences of given lengths."""

    geometry: UnitGeometry
    pool: Tensor
    tables: list[Tensor]
    lengths: list[int]

    @classmethod
    def make(
        cls,
        geometry: UnitGeometry,
        lengths: list[int],
        *,
        tier_units: int,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> PagedCache:
        generator = torch.Generator().manual_seed(seed)
        blocks = [geometry.num_blocks(n) for n in lengths]
        total = sum(blocks) * tier_units + 3
        units = torch.randperm(total - 1, generator=generator) + 1
        tables, start = [], 0
        for count in blocks:
            end = start + count * tier_units
            tables.append(units[start:end].view(count, tier_units))
            start = end
        pool = torch.full(
            (total, geometry.block_size, geometry.unit_width), float("nan"), dtype=dtype
        )
        pool[0] = 0.0
        return cls(geometry, pool, tables, lengths)

    def decode_batch(self) -> DecodeBatch:
        most = max(t.shape[0] for t in self.tables)
        padded = torch.zeros(len(self.tables), most, self.tables[0].shape[1], dtype=torch.int64)
        for i, table in enumerate(self.tables):
            padded[i, : table.shape[0]] = table
        return DecodeBatch(padded, torch.tensor(self.lengths), self.geometry)

    def slots(self, *, hidden: bool) -> WriteSlots:
        """Slots of all tokens of all sequences, in order."""
        g, none = self.geometry, torch.zeros(0, dtype=torch.int64)
        units, offsets = [], []
        for table, length in zip(self.tables, self.lengths, strict=True):
            tokens = torch.arange(length)
            units.append(table[tokens // g.block_size])
            offsets.append(tokens % g.block_size)
        all_units, all_offsets = torch.cat(units), torch.cat(offsets)
        if hidden:
            rows = hidden_rows(all_units, all_offsets, g).view(-1)
            return WriteSlots(None, none, none, None, rows)
        key_units, value_units = split_kv(all_units, g)
        return WriteSlots(
            None,
            head_rows(key_units, all_offsets, g).view(-1),
            head_rows(value_units, all_offsets, g).view(-1),
            None,
            none,
        )
