"""How keys, values and hidden states lie in the units of a pool.

A layer's pool is one tensor ``[num_units, block_size, unit_width]``. A block of ``block_size``
tokens takes, in the KV tier, ``kv_units`` units (first all of K, then all of V) and in the hidden
tier ``hidden_units``. Inside a unit

- K and V are head-major, ``[heads_per_unit, block_size, head_dim]``: a decode reads one head's
  tokens as one run of memory;
- hidden states are token-major, ``[block_size, unit_width]``: a token's vector is one run.

Both fill the same bytes, so a unit serves either tier without being moved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class UnitGeometry:
    """Sizes of a pool, in elements. ``hidden_units`` is 0 where the tier makes no sense."""

    block_size: int
    unit_width: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    hidden_units: int

    @classmethod
    def of(
        cls, *, block_size: int, num_kv_heads: int, head_dim: int, hidden_size: int
    ) -> UnitGeometry:
        """The geometry of a model.

        A unit is as wide as K. Where K and the hidden state differ in width, it is their greatest
        common divisor, if that holds whole heads and hidden states are smaller than K and V;
        otherwise the hidden tier is left out.
        """
        key_width = num_kv_heads * head_dim
        width = math.gcd(key_width, hidden_size)
        if hidden_size >= 2 * key_width or width % head_dim:
            return cls(block_size, key_width, num_kv_heads, head_dim, hidden_size, 0)
        return cls(block_size, width, num_kv_heads, head_dim, hidden_size, hidden_size // width)

    @property
    def key_units(self) -> int:
        """Units of K alone in one block; V takes as many."""
        return self.num_kv_heads * self.head_dim // self.unit_width

    @property
    def kv_units(self) -> int:
        """Units of one block in the KV tier."""
        return 2 * self.key_units

    @property
    def heads_per_unit(self) -> int:
        """KV heads whose keys (or values) share one unit."""
        return self.unit_width // self.head_dim

    @property
    def unit_elements(self) -> int:
        """Elements of one unit in one layer."""
        return self.block_size * self.unit_width

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)
