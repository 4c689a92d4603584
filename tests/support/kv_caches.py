"""Filled caches of keys and values, plain and as codes, and batches over them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from aptserve_kernels import UnitGeometry
from aptserve_kernels import reference as ref
from aptserve_kernels.batch import PrefillBatch
from aptserve_kernels.index import head_rows
from aptserve_kernels.quantised import new_scales, write_kv8
from torch import Tensor

from support.caches import PagedCache


@dataclass
class KvCache:
    """``k``, ``v``: what the cache holds, ``[tokens, kv_heads, head_dim]`` of all sequences."""

    paged: PagedCache
    k: Tensor
    v: Tensor

    @classmethod
    def make(
        cls,
        lengths: list[int],
        *,
        kv_heads: int = 2,
        head_dim: int = 48,
        block_size: int = 16,
        key_units: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> KvCache:
        geometry = make_wide_geometry(kv_heads, head_dim, block_size, key_units)
        paged = PagedCache.make(geometry, lengths, tier_units=geometry.kv_units, dtype=dtype)
        paged.pool[0] = float("nan")  # padding of the tables points at it
        k, v = torch.randn(2, sum(lengths), kv_heads, head_dim).to(dtype)
        ref.write_cache(paged.pool, k, v, None, paged.slots(hidden=False))
        return cls(paged, k, v)

    @property
    def pool(self) -> Tensor:
        return self.paged.pool

    @property
    def geometry(self) -> UnitGeometry:
        return self.paged.geometry

    def prefill_batch(self, new_tokens: list[int]) -> PrefillBatch:
        return prefill_batch(self.paged, new_tokens)


@dataclass
class Kv8Cache:
    """Keys and values as codes, times ``magnitude``; scales of what holds nothing are NaN."""

    paged: PagedCache
    scales: Tensor
    code_dtype: torch.dtype

    @classmethod
    def make(
        cls,
        lengths: list[int],
        code_dtype: torch.dtype,
        *,
        kv_heads: int = 2,
        head_dim: int = 48,
        key_units: int = 1,
        magnitude: float = 1.0,
        dtype: torch.dtype = torch.float16,
    ) -> Kv8Cache:
        geometry = make_wide_geometry(kv_heads, head_dim, 16, key_units)
        paged = PagedCache.make(geometry, lengths, tier_units=geometry.key_units, dtype=dtype)
        paged.pool[0] = float("nan")
        scales = new_scales(paged.pool.shape[0], geometry, paged.pool.device)
        scales.fill_(float("nan"))
        k, v = torch.randn(2, sum(lengths), kv_heads, head_dim)
        # Magnitudes that differ from token to token, so that each scale matters.
        v *= torch.exp2(torch.randint(-3, 4, (sum(lengths), 1, 1))) * magnitude
        slots = torch.cat(
            [
                head_rows(table[(t := torch.arange(n)) // 16], t % 16, geometry).view(-1)
                for table, n in zip(paged.tables, lengths, strict=True)
            ]
        )
        write_kv8(paged.pool, scales, k.to(dtype), v.to(dtype), slots, geometry, code_dtype)
        return cls(paged, scales, code_dtype)

    @property
    def pool(self) -> Tensor:
        return self.paged.pool

    def wide(self) -> tuple[Tensor, Tensor]:
        """Pool and scales for a twin that computes in float32."""
        units = self.pool.view(torch.int8).flatten(1)
        codes = torch.cat((units, torch.zeros_like(units)), 1).view(torch.float32)
        return codes.view(self.pool.shape), self.scales


def make_wide_geometry(
    kv_heads: int, head_dim: int, block_size: int, key_units: int
) -> UnitGeometry:
    """A geometry whose keys of a block lie in ``key_units`` units."""
    width = kv_heads * head_dim
    geometry = UnitGeometry.of(
        block_size=block_size, num_kv_heads=kv_heads, head_dim=head_dim, hidden_size=width
    )
    return replace(geometry, unit_width=width // key_units, hidden_units=key_units)


def prefill_batch(paged: PagedCache, new_tokens: list[int]) -> PrefillBatch:
    """The last ``new_tokens`` of each sequence are queries; all of its tokens are keys."""
    decode = paged.decode_batch()
    return PrefillBatch(
        query_starts=starts(new_tokens),
        lengths=decode.lengths,
        tables=decode.tables,
        geometry=decode.geometry,
        max_queries=max(new_tokens),
        key_starts=starts(paged.lengths),
    )


def starts(counts: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(counts)])
