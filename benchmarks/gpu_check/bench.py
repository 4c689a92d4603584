"""A layer's pool, weights and queries at a model's shape, and the calls that are timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from aptserve_kernels import AttentionParams, KeyProjection, LinearMap, Rotary, WriteSlots, costs
from aptserve_kernels import reference as ref
from aptserve_kernels.batch import DecodeBatch
from aptserve_kernels.costs import Cost, Shape
from aptserve_kernels.dispatch import Kernels, resolve
from aptserve_kernels.index import head_rows, hidden_rows, split_kv
from aptserve_kernels.quantised import new_scales
from aptserve_kernels.sampling import SamplingBatch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu_check.cases_sampling import batch_of
from benchmarks.gpu_check.prefill_bench import PrefillBench
from benchmarks.gpu_check.timing import Call


@dataclass
class Bench:
    """Sequences of equal length; one pool serves every tier, each with tables of its own."""

    shape: Shape
    device: torch.device
    is_dry: bool
    kernels: Kernels
    pool: Tensor
    kv_tables: Tensor
    q: Tensor

    @classmethod
    def make(cls, shape: Shape, device: torch.device, *, is_dry: bool) -> Bench:
        """Filled at random."""
        dtype = torch.float32 if is_dry else torch.bfloat16
        g = shape.geometry
        blocks = g.num_blocks(shape.context)
        count = shape.batch * blocks * g.kv_units
        pool = torch.empty(count, g.block_size, g.unit_width, dtype=dtype, device=device)
        pool.normal_()
        tables = torch.randperm(count, device=device).view(shape.batch, blocks, g.kv_units)
        q = torch.randn(shape.batch, shape.num_heads, shape.head_dim, device=device).to(dtype)
        kernels = resolve(device, dtype, "triton")
        return cls(shape, device, is_dry, kernels, pool, tables, q)

    @property
    def params(self) -> AttentionParams:
        """As models have them."""
        return AttentionParams(self.shape.head_dim**-0.5)

    @property
    def vocab_size(self) -> int:
        """Of the model, as far as sampling is concerned."""
        if self.is_dry:
            return 100
        return 50272 if self.shape.num_kv_heads == self.shape.num_heads else 128256

    @property
    def write_rows(self) -> tuple[int, ...]:
        """Tokens of a decode step and of a prefill."""
        return (3,) if self.is_dry else (64, 4096)

    @cached_property
    def lengths(self) -> Tensor:
        """All alike."""
        return torch.full((self.shape.batch,), self.shape.context, device=self.device)

    @cached_property
    def hidden_tables(self) -> Tensor:
        """Half as many units or so, anywhere in the pool."""
        return self._tables(self.shape.geometry.hidden_units)

    def _tables(self, units_per_block: int) -> Tensor:
        batch, blocks, _ = self.kv_tables.shape
        units = torch.randperm(len(self.pool), device=self.device)
        return units[: batch * blocks * units_per_block].view(batch, blocks, units_per_block)

    @cached_property
    def key_weight(self) -> Tensor:
        """``[kv_width, hidden_size]``; that of values is alike."""
        s = self.shape
        scale = float(s.hidden_size**-0.5)
        return self._new(s.kv_width, s.hidden_size) * scale

    @cached_property
    def value_weight(self) -> Tensor:
        """As ``key_weight``."""
        return self.key_weight.flip(0)

    @cached_property
    def fold_weight(self) -> Tensor:
        """``[heads, head_dim, hidden_size]``."""
        return self.key_weight.view(self.shape.num_heads, self.shape.head_dim, -1)

    @cached_property
    def unfold_weight(self) -> Tensor:
        """``[heads, hidden_size, head_dim]``, as the worker has it."""
        per_head = self.value_weight.view(self.shape.num_heads, self.shape.head_dim, -1)
        return per_head.transpose(1, 2)

    @cached_property
    def folded(self) -> Tensor:
        """Queries as they come from the fold: heads outermost."""
        return ref.fold_queries(self.q, self.fold_weight)

    def _batch(self, tables: Tensor) -> DecodeBatch:
        return DecodeBatch(tables, self.lengths, self.shape.geometry)

    @cached_property
    def _kv_batch(self) -> DecodeBatch:
        return self._batch(self.kv_tables)

    @cached_property
    def _hidden_batch(self) -> DecodeBatch:
        return self._batch(self.hidden_tables)

    def decode_kv(self) -> Tensor:
        """Over keys and values in blocks."""
        return self.kernels.decode_kv(self.q, self.pool, self._kv_batch, self.params)

    def decode_hidden(self) -> Tensor:
        """Over hidden states, from folded queries to sums of states."""
        batch = self._hidden_batch
        return self.kernels.decode_hidden(self.folded, self.pool, batch, self.params)

    def decode_absorbed(self) -> Tensor:
        """The same from queries to outputs."""
        folded = ref.fold_queries(self.q, self.fold_weight)
        batch = self._hidden_batch
        mixed = self.kernels.decode_hidden(folded, self.pool, batch, self.params)
        return ref.unfold_values(mixed, self.unfold_weight, None)

    @cached_property
    def _projection(self) -> KeyProjection:
        angles = torch.rand(self.shape.context, self.shape.head_dim, device=self.device)
        dtype = self.pool.dtype
        rotary = Rotary(angles.cos().to(dtype), angles.sin().to(dtype))
        return KeyProjection(LinearMap(self.key_weight), rotary=rotary)

    def decode_projected(self) -> Tensor:
        """Over hidden states, keys made anew on the way."""
        batch = self._hidden_batch
        return self.kernels.decode_projected(
            self.q, self.pool, batch, self.params, self._projection
        )

    def _code_dtypes(self) -> tuple[torch.dtype, ...]:
        from aptserve_kernels.gpu.tiles import code_dtypes, target_of

        return code_dtypes(self.pool.dtype, target_of(self.device))

    def decode_kv8_calls(self) -> Iterator[tuple[torch.dtype, Call]]:
        """Over codes, a call for each kind that the device has."""
        g = self.shape.geometry
        for code_dtype in self._code_dtypes():
            pool, scales = torch.empty_like(self.pool), new_scales(len(self.pool), g, self.device)
            pool.view(torch.int8).random_(0, 100)  # no NaN, whatever the codes mean
            scales.fill_(0.02)
            batch = self._batch(self._tables(g.key_units))
            call = partial(self.kernels.decode_kv8, self.q, pool, scales, batch, self.params)
            yield code_dtype, partial(call, code_dtype)

    def torch_decode(self) -> Call:
        """torch's attention over keys and values that lie in order."""
        k, v = (
            self._in_order(self.pool[: len(self.pool) // 2]),
            self._in_order(self.pool[len(self.pool) // 2 :]),
        )
        return partial(self._attention, k, v)

    def _in_order(self, units: Tensor) -> Tensor:
        """Any memory as ``[batch, kv_heads, context, head_dim]``."""
        s = self.shape
        tokens = self.kv_tables.shape[1] * s.block_size
        return units.reshape(s.batch, s.num_kv_heads, tokens, s.head_dim)[:, :, : s.context]

    def _attention(self, k: Tensor, v: Tensor) -> Tensor:
        is_grouped = self.shape.num_heads != self.shape.num_kv_heads
        return scaled_dot_product_attention(self.q.unsqueeze(2), k, v, enable_gqa=is_grouped)

    @property
    def reprojected_cost(self) -> Cost:
        """With the copy out of the pool that torch needs first."""
        return costs.decode_reprojected(self.shape) + costs.gather_hidden(self.shape)

    def reprojected(self) -> Tensor:
        """What Apt-Serve's paper does: all keys and values again, then attention over them."""
        s = self.shape
        table = self.hidden_tables.view(-1, s.geometry.hidden_units)
        tokens = len(table) * s.block_size
        x = self.kernels.gather_hidden(self.pool, table, tokens, s.geometry)
        k, v = (
            torch.nn.functional.linear(x, weight)
            .view(s.batch, -1, s.num_kv_heads, s.head_dim)
            .transpose(1, 2)
            for weight in (self.key_weight, self.value_weight)
        )
        return self._attention(k[:, :, : s.context], v[:, :, : s.context])

    def prefills(self) -> Iterator[tuple[str, PrefillBench]]:
        """Whole prompts, and chunks after a context."""
        sizes = ((2, 24, 24), (2, 32, 8)) if self.is_dry else ((4, 2048, 2048), (8, 4096, 512))
        for batch, context, new in sizes:
            shape = replace(self.shape, batch=batch, context=context, new_tokens=new)
            about = f"prompts of {new}" if new == context else f"chunks of {new} after {context}"
            yield about, PrefillBench.make(shape, self.kernels, self.pool.dtype, self.device)

    def write_kv(self, rows: int) -> Call:
        """New keys and values to anywhere in the pool."""
        units, offsets = self._places(self.kv_tables, rows)
        keys, values = split_kv(units, self.shape.geometry)
        g, none = self.shape.geometry, self.lengths[:0]
        slots = WriteSlots(
            None,
            head_rows(keys, offsets, g).view(-1),
            head_rows(values, offsets, g).view(-1),
            None,
            none,
        )
        k = self._new(rows, self.shape.num_kv_heads, self.shape.head_dim)
        return partial(self.kernels.write_cache, self.pool, k, k.clone(), None, slots)

    def write_hidden(self, rows: int) -> Call:
        """New hidden states to anywhere in the pool."""
        g, none = self.shape.geometry, self.lengths[:0]
        slots = WriteSlots(
            None, none, none, None, hidden_rows(*self._places(self.hidden_tables, rows), g).view(-1)
        )
        x, k = self._new(rows, g.hidden_size), self._new(rows, 0, g.head_dim)
        return partial(self.kernels.write_cache, self.pool, k, k, x, slots)

    def write_kv8_calls(self, rows: int) -> Iterator[tuple[torch.dtype, Call]]:
        """New keys and values as codes."""
        g = self.shape.geometry
        k = self._new(rows, g.num_kv_heads, g.head_dim)
        slots = head_rows(*self._places(self._tables(g.key_units), rows), g).view(-1)
        for code_dtype in self._code_dtypes():
            scales = new_scales(len(self.pool), g, self.device)
            write: Callable[..., None] = self.kernels.write_kv8
            yield code_dtype, partial(write, self.pool, scales, k, k, slots, g, code_dtype)

    def _places(self, tables: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Units and offsets of the first token of some blocks, all different."""
        blocks = tables.reshape(-1, tables.shape[2])
        size = self.shape.block_size
        tokens = torch.arange(rows, device=self.device) * (len(blocks) * size // rows)
        return blocks[tokens // size], tokens % size

    def _new(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.pool.dtype)

    def promote(self) -> None:
        """One sequence from hidden states to keys and values."""
        s = self.shape
        value = LinearMap(self.value_weight)
        tables = self.hidden_tables[0], self.kv_tables[0]
        key = KeyProjection(LinearMap(self.key_weight))
        self.kernels.promote(self.pool, *tables, s.context, key, value, s.geometry)

    def sample_calls(self) -> Iterator[tuple[int, str, Call]]:
        """Rows, which filters, and the call."""
        for rows in (2,) if self.is_dry else (64, 256):
            logits = torch.randn(rows, self.vocab_size, device=self.device) * 3
            kinds: list[tuple[str, SamplingBatch]] = [
                ("greedy", batch_of(self.device, rows, temperature=0.0)),
                ("plain", batch_of(self.device, rows)),
                ("top-k 50, top-p 0.9", batch_of(self.device, rows, top_k=50, top_p=0.9)),
            ]
            for name, batch in kinds:
                yield rows, name, partial(self.kernels.sample, logits, batch)
