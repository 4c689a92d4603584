"""How a decode attends over hidden states: queries folded or keys projected, values unfolded."""

from __future__ import annotations

from dataclasses import dataclass, replace

from aptserve_kernels import AttentionParams, KeyProjection, LinearMap, Rotary
from aptserve_kernels.reference import fold_queries, unfold_values
from torch import Tensor

from aptserve_worker.model.adapters import HiddenMaps
from aptserve_worker.parallel.group import RankGroup
from aptserve_worker.parallel.shard import Shard


@dataclass(frozen=True, slots=True)
class StateMaps:
    """How a decode attends over the hidden states that a rank holds: with all heads of the layer.

    So every rank has the key and value weights of all heads, ``2 · (size - 1) / size`` of a key
    projection more than its share. To fold and unfold with its own heads' weights alone it would
    have to send ``hidden_size`` numbers per head and row instead of ``head_dim``.
    """

    key: KeyProjection
    """For the projected form. Token i is the rank's i-th, not the sequence's."""
    _fold_weight: Tensor | None
    """``[heads, head_dim, hidden_size]``; None where keys do not follow linearly."""
    _unfold_weight: Tensor
    """``[heads, hidden_size, head_dim]``"""
    _unfold_bias: Tensor | None

    @classmethod
    def of(cls, maps: HiddenMaps, shard: Shard, group: RankGroup, num_heads: int) -> StateMaps:
        """From the maps of this rank's heads; ``num_heads``: its query heads."""
        head_dim, repeats = shard.kv.head_dim, num_heads // shard.kv.num_kv_heads

        def of_heads(rows: Tensor) -> Tensor:  # [kv heads * head_dim, …] → [heads, head_dim, …]
            return _repeat(rows.reshape(-1, head_dim, *rows.shape[1:]), repeats)

        key, value = (_of_all_heads(each, group) for each in (maps.key.map, maps.value))
        return cls(
            key=replace(maps.key, map=key, rotary=_of_tokens(maps.key.rotary, shard)),
            _fold_weight=of_heads(key.weight) if maps.key.is_foldable else None,
            _unfold_weight=of_heads(value.weight).transpose(1, 2),
            _unfold_bias=None if value.bias is None else of_heads(value.bias),
        )

    def may_fold(self, params: AttentionParams) -> bool:
        """A key bias drops out of a softmax, but not out of the soft-cap before it."""
        has_bias = self.key.map.bias is not None
        return self._fold_weight is not None and (params.softcap is None or not has_bias)

    def fold(self, q: Tensor) -> Tensor:
        """See :func:`aptserve_kernels.reference.fold_queries`."""
        assert self._fold_weight is not None
        return fold_queries(q, self._fold_weight)

    def unfold(self, mixed: Tensor) -> Tensor:
        """See :func:`aptserve_kernels.reference.unfold_values`."""
        return unfold_values(mixed, self._unfold_weight, self._unfold_bias)


def _of_all_heads(part: LinearMap, group: RankGroup) -> LinearMap:
    bias = None if part.bias is None else group.gather_weights(part.bias)
    return LinearMap(group.gather_weights(part.weight), bias)


def _of_tokens(rotary: Rotary | None, shard: Shard) -> Rotary | None:
    """The rotation by the place of a rank's token among the rank's tokens."""
    if rotary is None or shard.size == 1:
        return rotary
    rows = slice(shard.rank, None, shard.size)
    return replace(rotary, cos=rotary.cos[rows].contiguous(), sin=rotary.sin[rows].contiguous())


def _repeat(weight: Tensor, group: int) -> Tensor:
    return weight if group == 1 else weight.repeat_interleave(group, 0)
