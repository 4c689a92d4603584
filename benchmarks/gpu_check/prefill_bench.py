"""Prefill of equal sequences, in blocks, as one piece, and by torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from aptserve_kernels import AttentionParams
from aptserve_kernels.batch import PrefillBatch
from aptserve_kernels.costs import Shape
from aptserve_kernels.dispatch import Kernels
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True, slots=True)
class PrefillBench:
    """The last ``shape.new_tokens`` of each sequence's ``shape.context`` tokens are queries."""

    shape: Shape
    kernels: Kernels
    batch: PrefillBatch
    pool: Tensor
    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def make(
        cls, shape: Shape, kernels: Kernels, dtype: torch.dtype, device: torch.device
    ) -> PrefillBench:
        """Filled at random."""
        s, g = shape, shape.geometry
        blocks = g.num_blocks(s.context)
        count = s.batch * blocks * g.kv_units
        pool = torch.empty(count, g.block_size, g.unit_width, dtype=dtype, device=device).normal_()
        tables = torch.randperm(count, device=device).view(s.batch, blocks, g.kv_units)
        rows = torch.arange(s.batch + 1, device=device)
        batch = PrefillBatch(
            query_starts=rows * s.new_tokens,
            lengths=torch.full((s.batch,), s.context, device=device),
            tables=tables,
            geometry=g,
            max_queries=s.new_tokens,
            key_starts=rows * s.context,
        )
        q = torch.randn(s.batch * s.new_tokens, s.num_heads, s.head_dim, device=device).to(dtype)
        shape_of_keys = (s.batch * s.context, s.num_kv_heads, s.head_dim)
        k, v = (torch.randn(shape_of_keys, device=device).to(dtype) for _ in range(2))
        return cls(replace(s), kernels, batch, pool, q, k, v)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is cached."""
        return self.shape.new_tokens == self.shape.context

    @property
    def _params(self) -> AttentionParams:
        return AttentionParams(self.shape.head_dim**-0.5)

    def paged(self) -> Tensor:
        """Over keys and values in blocks."""
        return self.kernels.prefill_kv(self.q, self.pool, self.batch, self._params)

    def ragged(self) -> Tensor:
        """Over keys and values in one piece."""
        return self.kernels.attend_ragged(self.q, self.k, self.v, self.batch, self._params)

    def torch_attention(self) -> Tensor:
        """Over the same in one piece."""
        q, k, v = (self._by_sequence(x) for x in (self.q, self.k, self.v))
        arguments: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]}
        if self.is_whole:
            arguments["is_causal"] = True
        else:
            from torch.nn.attention.bias import causal_lower_right

            arguments["attn_mask"] = causal_lower_right(q.shape[2], k.shape[2])
        return scaled_dot_product_attention(q, k, v, **arguments)

    def _by_sequence(self, x: Tensor) -> Tensor:
        return x.view(self.shape.batch, -1, *x.shape[1:]).transpose(1, 2)
