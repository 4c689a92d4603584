"""Filled paged caches on a device, NaN wherever no token is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from aptserve_kernels import UnitGeometry, WriteSlots
from aptserve_kernels import reference as ref
from aptserve_kernels.batch import DecodeBatch, PrefillBatch
from aptserve_kernels.index import head_rows, hidden_rows, split_kv
from aptserve_kernels.quantised import new_scales, write_kv8
from torch import Tensor


def geometry_of(
    kv_heads: int, head_dim: int, *, block_size: int = 16, hidden: int | None = None
) -> UnitGeometry:
    """With a hidden state as wide as the keys unless told."""
    return UnitGeometry.of(
        block_size=block_size,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=kv_heads * head_dim if hidden is None else hidden,
    )


@dataclass(frozen=True, slots=True)
class Cache:
    """A pool and the tables ``[sequences, max_blocks, units_per_block]`` of shuffled units."""

    geometry: UnitGeometry
    pool: Tensor
    tables: Tensor
    lengths: list[int]

    @classmethod
    def empty(
        cls,
        geometry: UnitGeometry,
        lengths: list[int],
        units_per_block: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Cache:
        """Without any token."""
        blocks = [geometry.num_blocks(n) for n in lengths]
        count = sum(blocks) * units_per_block
        units = torch.randperm(count) + 1
        tables = torch.zeros(len(lengths), max(1, *blocks), units_per_block, dtype=torch.int64)
        for i, (end, size) in enumerate(zip(accumulate(blocks), blocks, strict=True)):
            taken = units[(end - size) * units_per_block : end * units_per_block]
            tables[i, :size] = taken.view(size, units_per_block)
        shape = (count + 1, geometry.block_size, geometry.unit_width)
        pool = torch.full(shape, float("nan"), dtype=dtype, device=device)
        return cls(geometry, pool, tables.to(device), lengths)

    @classmethod
    def of_kv(
        cls, geometry: UnitGeometry, lengths: list[int], dtype: torch.dtype, device: torch.device
    ) -> Cache:
        """Filled with random keys and values."""
        cache = cls.empty(geometry, lengths, geometry.kv_units, dtype, device)
        k, v = cache.random_heads(), cache.random_heads()
        ref.write_cache(cache.pool, k, v, None, cache.kv_slots())
        return cache

    @classmethod
    def of_hidden(
        cls, geometry: UnitGeometry, lengths: list[int], dtype: torch.dtype, device: torch.device
    ) -> Cache:
        """Filled with random hidden states."""
        cache = cls.empty(geometry, lengths, geometry.hidden_units, dtype, device)
        x = torch.randn(sum(lengths), geometry.hidden_size, device=device).to(dtype)
        none = x.new_zeros(x.shape[0], 0, geometry.head_dim)
        ref.write_cache(cache.pool, none, none, x, cache.hidden_slots())
        return cache

    @property
    def device(self) -> torch.device:
        """Where all of it lies."""
        return self.pool.device

    def random_heads(self) -> Tensor:
        """Vectors of all tokens, ``[tokens, num_kv_heads, head_dim]``."""
        g = self.geometry
        made = torch.randn(sum(self.lengths), g.num_kv_heads, g.head_dim, device=self.device)
        return made.to(self.pool.dtype)

    def ints(self, values: list[int]) -> Tensor:
        """On the device."""
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def decode_batch(self) -> DecodeBatch:
        """One query for each sequence."""
        return DecodeBatch(self.tables, self.ints(self.lengths), self.geometry)

    def prefill_batch(self, new_tokens: list[int]) -> PrefillBatch:
        """The last ``new_tokens`` of each sequence are queries; where it is empty, padding."""
        return PrefillBatch(
            query_starts=self.ints([0, *accumulate(new_tokens)]),
            lengths=self.ints(self.lengths),
            tables=self.tables,
            geometry=self.geometry,
            max_queries=max(new_tokens),
            key_starts=self.ints([0, *accumulate(self.lengths)]),
        )

    def kv_slots(self) -> WriteSlots:
        """Of all tokens of all sequences, in order."""
        units, offsets = self._places()
        keys, values = split_kv(units, self.geometry)
        none = self.ints([])
        return WriteSlots(
            None,
            head_rows(keys, offsets, self.geometry).view(-1),
            head_rows(values, offsets, self.geometry).view(-1),
            None,
            none,
        )

    def hidden_slots(self) -> WriteSlots:
        """As :meth:`kv_slots`."""
        none = self.ints([])
        rows = hidden_rows(*self._places(), self.geometry).view(-1)
        return WriteSlots(None, none, none, None, rows)

    def code_slots(self) -> Tensor:
        """As :meth:`kv_slots`, for keys and values as codes."""
        return head_rows(*self._places(), self.geometry).view(-1)

    def _places(self) -> tuple[Tensor, Tensor]:
        """The units of each token's block, and its place in the block."""
        size = self.geometry.block_size
        rows = [torch.full((n,), i) for i, n in enumerate(self.lengths)]
        tokens = torch.cat([torch.arange(n) for n in self.lengths])
        row, token = torch.cat(rows).to(self.device), tokens.to(self.device)
        return self.tables[row, token // size], token % size


@dataclass(frozen=True, slots=True)
class CodeCache:
    """Keys and values as codes; scales of what holds nothing are NaN."""

    cache: Cache
    scales: Tensor
    code_dtype: torch.dtype

    @classmethod
    def make(
        cls,
        geometry: UnitGeometry,
        lengths: list[int],
        code_dtype: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
    ) -> CodeCache:
        """Filled with random keys and values whose sizes differ from token to token."""
        cache = Cache.empty(geometry, lengths, geometry.key_units, dtype, device)
        scales = new_scales(cache.pool.shape[0], geometry, device).fill_(float("nan"))
        k, v = cache.random_heads(), cache.random_heads()
        v *= torch.exp2(torch.randint(-4, 1, (v.shape[0], 1, 1), device=device)).to(dtype)
        write_kv8(cache.pool, scales, k, v, cache.code_slots(), geometry, code_dtype)
        return cls(cache, scales, code_dtype)

    def wide_pool(self) -> Tensor:
        """The same codes in a pool of float32, for a twin that computes in it."""
        units = self.cache.pool.view(torch.int8).flatten(1)
        codes = torch.cat((units, torch.zeros_like(units)), 1).view(torch.float32)
        return codes.view(self.cache.pool.shape)


def far_away(cache: Cache) -> Cache:
    """The same cache at the end of a pool of more than 2^31 elements."""
    g, count = cache.geometry, cache.pool.shape[0]
    first = 2**31 // g.unit_elements + 1
    pool = cache.pool.new_empty(first + count, g.block_size, g.unit_width)
    pool[first:] = cache.pool
    return replace(cache, pool=pool, tables=cache.tables + first)
