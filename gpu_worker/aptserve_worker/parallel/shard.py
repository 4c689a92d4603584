"""A rank's share of every sequence's cache.

Keys and values are divided by heads: each rank holds those of its own heads, of all tokens. A
hidden state belongs to all heads, so a copy on every rank would cost as much as keys and values do
on two. Hidden states are divided by tokens instead: of ``size`` ranks, rank r holds those of tokens
r, r + size, r + 2 · size, …. So a block takes the same number of units in either tier whatever the
number of ranks, each unit of ``1 / size`` of the bytes, and every rank holds the same unit numbers.

Every size-th token, not one run of them: a sequence's tokens are then spread evenly at any length,
and a window of w tokens is one of ``w / size`` of the rank's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from aptserve_kernels import UnitGeometry
from aptserve_kernels.index import hidden_rows
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shard:
    """What rank ``rank`` of ``size`` holds; alone it holds everything."""

    rank: int
    size: int
    kv: UnitGeometry
    """Of this rank's keys and values; ``block_size`` counts tokens of the sequence."""
    hidden: UnitGeometry
    """Of this rank's hidden states, over the same units; ``block_size`` counts its own tokens."""

    @classmethod
    def alone(cls, geometry: UnitGeometry) -> Shard:
        """All of a cache of this geometry."""
        return cls(0, 1, geometry, geometry)

    @classmethod
    def of(cls, rank: int, size: int, geometry: UnitGeometry) -> Shard:
        """A rank's part of a cache; ``geometry`` is that of the whole one.

        ``hidden_units`` of both parts is 0 where hidden states cannot be divided so that a unit
        holds either tier: blocks and units have to split into ``size`` equal parts.
        """
        if size == 1:
            return cls.alone(geometry)
        g = geometry
        if g.hidden_units and g.block_size % size == 0 and g.heads_per_unit % size == 0:
            kv = replace(g, num_kv_heads=g.num_kv_heads // size, unit_width=g.unit_width // size)
            return cls(rank, size, kv, replace(g, block_size=g.block_size // size))
        heads = g.num_kv_heads // size
        kv = replace(g, num_kv_heads=heads, unit_width=heads * g.head_dim, hidden_units=0)
        return cls(rank, size, kv, kv)

    @property
    def block_size(self) -> int:
        """Tokens of a sequence in one block, over all ranks."""
        return self.kv.block_size

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens of a sequence."""
        return self.kv.num_blocks(num_tokens)

    def hidden_view(self, pool: Tensor) -> Tensor:
        """A layer's pool as the hidden tier sees it: ``[units, block_size, unit_width]``."""
        return pool.view(-1, self.hidden.block_size, self.hidden.unit_width)

    def count(self, num_tokens: Tensor) -> Tensor:
        """How many of the first ``num_tokens`` tokens this rank holds hidden states of."""
        if self.size == 1:
            return num_tokens
        return (num_tokens + (self.size - 1 - self.rank)) // self.size

    def most(self, num_tokens: int) -> int:
        """How many of the first ``num_tokens`` tokens any rank holds hidden states of at most."""
        return -(-num_tokens // self.size)

    def holds(self, positions: Tensor) -> Tensor:
        """Whether this rank holds the hidden states of the tokens at ``positions``."""
        return positions % self.size == self.rank

    def hidden_slots(self, units: Tensor, positions: Tensor) -> Tensor:
        """Where the hidden states of this rank's tokens go, see ``WriteSlots.hidden_slots``.

        ``units``: ``[tokens, hidden_units]`` of each token's block. Returns ``[tokens, pieces]``:
        the pool is addressed in vectors as wide as a unit of keys, of which a unit of hidden states
        has ``size`` side by side.
        """
        rows = hidden_rows(units, positions // self.size % self.hidden.block_size, self.hidden)
        if self.size == 1:
            return rows
        pieces = torch.arange(self.size, device=rows.device)
        return (rows.unsqueeze(-1) * self.size + pieces).flatten(1)
