"""What an attention operation is told about a batch: tables, lengths, parameters, projections."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from aptserve_kernels.geometry import UnitGeometry

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """Scores are ``s = scaling · q·k``, capped to ``softcap · tanh(s / softcap)``.

    A token sees ``window`` tokens, itself included; None: all before it.
    """

    scaling: float
    softcap: float | None = None
    window: int | None = None


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """Sequences with one query row each, all in one tier.

    ``tables``: ``[batch, max_blocks, units_per_block]`` int64 unit numbers, unused entries 0.
    ``lengths``: ``[batch]`` int64, cached tokens including the one just written; 0 is padding,
    whose row gets zeros.
    An implementation may keep what it derives from these for the other layers of the same step.
    """

    tables: Tensor
    lengths: Tensor
    geometry: UnitGeometry
    _derived: dict[Hashable, Any] = field(default_factory=dict)

    def derived(self, key: Hashable, build: Callable[[], _T]) -> _T:
        """The value built for ``key``, once per step."""
        if key not in self._derived:
            self._derived[key] = build()
        value: _T = self._derived[key]
        return value


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """Sequences with new tokens, one query row each; the rows of a sequence are neighbours.

    ``query_starts``: ``[sequences + 1]`` int64, where each sequence's rows begin, then their
    number. ``lengths``: ``[sequences]`` int64, cached and new tokens; 0 is padding, whose rows get
    zeros. ``tables``: ``[sequences, max_blocks, units_per_block]`` int64 unit numbers, unused
    entries 0. ``max_queries``: rows of the longest sequence, or more.

    ``key_starts``: ``[sequences + 1]`` int64, where each sequence's keys begin where these are one
    tensor without blocks; such an operation does not look at ``tables``.
    """

    query_starts: Tensor
    lengths: Tensor
    tables: Tensor
    geometry: UnitGeometry
    max_queries: int
    key_starts: Tensor | None = None


@dataclass(frozen=True, slots=True)
class WriteSlots:
    """Where the new tokens of a step go; computed once, used by every layer.

    ``kv_rows`` and ``hidden_rows`` are row numbers of the flattened batch, None for all rows.
    ``key_slots`` and ``value_slots`` index ``pool.view(-1, head_dim)``, one per (row, KV head);
    ``hidden_slots`` index ``pool.view(-1, unit_width)``, one per (row, unit). Empty tensors where a
    tier has no rows. ``kv8_slots`` are numbered like ``key_slots``, see
    :func:`aptserve_kernels.quantised.write_kv8`; None where no row is in that tier.
    """

    kv_rows: Tensor | None
    key_slots: Tensor
    value_slots: Tensor
    hidden_rows: Tensor | None
    hidden_slots: Tensor
    kv8_rows: Tensor | None = None
    kv8_slots: Tensor | None = None
    is_padded: bool = False
    """Whether slots may be negative, for rows that store nothing."""


@dataclass(frozen=True, slots=True)
class LinearMap:
    """``x @ weight.T + bias``; ``weight`` is ``[out, in]``."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to ``[..., in]``."""
        return torch.nn.functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotation of the first ``cos.shape[-1]`` elements of each head by position.

    ``cos`` and ``sin``: ``[positions, rotary_dim]``. ``interleaved`` pairs elements (2i, 2i+1),
    otherwise (i, i + rotary_dim/2).
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """Root mean square norm over each head (Zhang and Sennrich, arXiv 1910.07467).

    ``weight``: ``[head_dim]``, what a normed element is multiplied by; a model that stores it less
    one adds the one.
    """

    weight: Tensor
    eps: float

    def __call__(self, k: Tensor) -> Tensor:
        """Keys ``[tokens, heads, head_dim]``, normed in float32 or wider."""
        wide = k.to(torch.promote_types(k.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight).to(k.dtype)


@dataclass(frozen=True, slots=True)
class KeyProjection:
    """From hidden states to keys: a linear map, then a norm per head, then a rotation.

    ``map.weight``: ``[num_kv_heads * head_dim, hidden_size]``. Only without ``norm`` and ``rotary``
    can the map be folded into the query.
    """

    map: LinearMap
    norm: Callable[[Tensor], Tensor] | None = None
    rotary: Rotary | None = None

    @property
    def is_foldable(self) -> bool:
        """Whether scores against keys equal scores of folded queries against hidden states."""
        return self.norm is None and self.rotary is None
