"""How long an iteration of a mixed batch takes: every kernel of every layer, added up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

import numpy as np

from aptserve_scheduler.arrays import Ints, Tiers, all_of
from aptserve_scheduler.core import Tier
from aptserve_scheduler.sim.cost.hardware import Gpu, tile_rows
from aptserve_scheduler.sim.cost.models import ModelShape
from aptserve_scheduler.sim.worker import Amount

HOST_SECONDS = 1.5e-3
"""Time of an iteration in which the GPU waits: reading the plan, preparing and copying inputs,
launching the captured kernels, sampling, handing out tokens. An assumption, not a fit."""

# A plain number, with which numpy compares several times faster than with the member.
_HIDDEN = int(Tier.HIDDEN)
_READS_OF_HIDDEN = 2
"""Times that absorbed attention reads a hidden state: as key and as value."""


class HiddenAttention(StrEnum):
    """How a decode step attends over cached hidden states."""

    ABSORBED = "absorbed"
    """Key weights folded into the query, value weights applied to the sum; no rotary embedding."""
    REPROJECTED = "reprojected"
    """Keys and values of every cached token computed anew and written, as in Apt-Serve's paper."""
    PROJECTED = "projected"
    """Keys computed anew, values absorbed: what a rotary embedding leaves."""


class StepModel:
    """Time of iterations of one model on one GPU, or on ``ranks`` equal ones (``StepCost``).

    A sequence with one new token is a decode over its cache and that token; with more it is part
    of a prefill, which reads cached keys and values, or projects cached hidden states to them once.
    Each sequence costs a row of the output head.
    """

    def __init__(
        self,
        model: ModelShape,
        gpu: Gpu,
        *,
        tiers: Sequence[Tier] = (Tier.KV,),
        hidden_attention: HiddenAttention = HiddenAttention.ABSORBED,
        ranks: int = 1,
        host_seconds: float = HOST_SECONDS,
    ) -> None:
        self.model = model
        self.gpu = gpu
        self._ranks = ranks
        self._host_seconds = host_seconds
        of_hidden = {
            HiddenAttention.ABSORBED: self._absorbed_seconds,
            HiddenAttention.REPROJECTED: self._reprojected_seconds,
            HiddenAttention.PROJECTED: self._projected_seconds,
        }[hidden_attention]
        of_tier = {Tier.KV: self._kv_seconds, Tier.HIDDEN: of_hidden}
        self._decodes: list[tuple[int, Callable[[int, Any], Any]]] = [
            (int(tier), of_tier[tier]) for tier in tiers
        ]
        self._dense: dict[int, float] = {}
        self._heads: dict[int, float] = {}

    def seconds(self, num_cached: Ints, num_new: Ints, tiers: Tiers) -> float:
        """Seconds of one iteration; arrays are [n], an entry per sequence."""
        seconds = self._weights_seconds(int(np.add.reduce(num_new)), len(num_new))
        one = num_new == 1
        if not all_of(one):
            many = ~one
            prefill = self._prefill_seconds(num_cached[many], num_new[many], tiers[many])
            seconds += self.model.num_layers * prefill
        for tier, decode in self._decodes:
            mask = one & (tiers == tier)
            if count := int(np.count_nonzero(mask)):
                cached = float(np.add.reduce(num_cached[mask]))
                seconds += self.model.num_layers * decode(count, cached)
        return float(seconds)

    def decode_seconds(self, num_sequences: Sequence[int], num_cached: Sequence[Amount]) -> Amount:
        """Seconds of decodes; see :meth:`StepCost.decode_seconds`."""
        total = sum(num_sequences)
        seconds = self._weights_seconds(total, total)
        for count, cached, (_, decode) in zip(
            num_sequences, num_cached, self._decodes, strict=True
        ):
            if count:
                seconds = seconds + self.model.num_layers * decode(count, cached)
        return seconds

    def _weights_seconds(self, num_tokens: int, num_sequences: int) -> float:
        """All but attention; few values recur, so each is computed once."""
        dense = self._dense.get(num_tokens)
        if dense is None:
            dense = self._dense[num_tokens] = self._dense_seconds(num_tokens)
        head = self._heads.get(num_sequences)
        if head is None:
            outputs = self.model.vocab_size / self._ranks
            head = float(self.gpu.gemm_seconds(num_sequences, outputs, self.model.hidden_size))
            self._heads[num_sequences] = head
        return dense + head

    def _dense_seconds(self, num_tokens: int) -> float:
        layer = self.layer_seconds(num_tokens)
        # Reading and writing the embedding, and the last norm.
        ends = self.gpu.elementwise_seconds(2, 4 * self.model.hidden_size * num_tokens)
        return float(self._host_seconds + self.model.num_layers * layer + ends)

    def layer_seconds(self, num_tokens: int) -> float:
        """One layer without attention: products, norms, activation, cache write, all-reduces."""
        model, gpu, ranks = self.model, self.gpu, self._ranks
        d, ffn = model.hidden_size, model.ffn_size / ranks
        q, kv = d / ranks, model.kv_width / ranks
        products = (
            gpu.gemm_seconds(num_tokens, q + 2 * kv, d)
            + gpu.gemm_seconds(num_tokens, d, q)
            + gpu.gemm_seconds(num_tokens, model.up_width / ranks, d)
            + gpu.gemm_seconds(num_tokens, d, ffn)
        )
        # Two norms, two residual sums, the activation, the write to the cache; rotation.
        numbers = 2 * 2 * d + 2 * 3 * d + (model.up_width / ranks + ffn) + 4 * kv
        if model.rotary:
            numbers += 2 * (q + kv)
        others = gpu.elementwise_seconds(7 if model.rotary else 6, numbers * num_tokens)
        return float(products + others + 2 * gpu.all_reduce_seconds(ranks, d * num_tokens))

    def _prefill_seconds(self, num_cached: Ints, num_new: Ints, tiers: Tiers) -> Any:
        d, q, kv = self.model.hidden_size, self._query_width, self._kv_width
        rows = float(np.add.reduce(num_new))
        keys = float(np.add.reduce(num_cached)) + rows
        # Row i of [0, n) of an entry sees the c cached tokens and i + 1 new ones.
        pairs = float(np.add.reduce(num_new * (num_cached + 0.5 * (num_new + 1))))
        numbers = 2 * q * rows + 2 * kv * keys
        seconds = self.gpu.prefill_attention_seconds(pairs, rows, numbers, q)
        held_as_hidden = float(np.add.reduce(num_cached[tiers == _HIDDEN]))
        if held_as_hidden:
            seconds += self.gpu.gemm_seconds(held_as_hidden, 2 * kv, d)
        return seconds

    def _kv_seconds(self, count: int, cached: Any) -> Any:
        numbers = 2 * self._kv_width * (cached + count)
        return self.gpu.decode_attention_seconds(numbers, self._num_blocks(count))

    def _absorbed_seconds(self, count: int, cached: Any) -> Any:
        """score = (W_K^T q) x and out = W_V (sum p x): 4 H d FLOP per cached token."""
        d, rows = self.model.hidden_size, tile_rows(self.model.num_heads)
        tokens = cached + count
        # Every head has a folded query and a sum of d numbers: written by one, read by the next.
        folded = 4 * self.model.num_heads * d * count
        numbers = _READS_OF_HIDDEN * d * tokens + folded
        attention = self.gpu.decode_attention_seconds(
            numbers, self._num_blocks(count), 4.0 * rows * d * tokens
        )
        return attention + 2 * self.gpu.gemm_seconds(count, self._kv_width, d)

    def _reprojected_seconds(self, count: int, cached: Any) -> Any:
        """4 d^2 FLOP per cached token; the products write K and V, attention reads them."""
        tokens = cached + count
        project = self.gpu.gemm_seconds(tokens, 2 * self._kv_width, self.model.hidden_size)
        return project + self._kv_seconds(count, cached)

    def _projected_seconds(self, count: int, cached: Any) -> Any:
        """2 d^2 FLOP per cached token for K; V stays folded, as in the absorbed form."""
        model, d = self.model, self.model.hidden_size
        tokens = cached + count
        project = self.gpu.gemm_seconds(tokens, self._kv_width, d)
        numbers = (self._kv_width + d) * tokens + 2 * model.num_heads * d * count
        operations = 2.0 * tile_rows(model.num_heads) * (model.head_size + d) * tokens
        attention = self.gpu.decode_attention_seconds(numbers, self._num_blocks(count), operations)
        return project + attention + self.gpu.gemm_seconds(count, self._kv_width, d)

    @property
    def _query_width(self) -> float:
        return self.model.hidden_size / self._ranks

    @property
    def _kv_width(self) -> float:
        return self.model.kv_width / self._ranks

    def _num_blocks(self, count: int) -> float:
        """Parts of a decode's work. Over hidden states, which all heads share, attention is taken
        to split contexts into as many parts instead."""
        return count * self.model.num_kv_heads / self._ranks
