"""Our caches under transformers' attention.

transformers calls one registered function for every attention module of a model; it finds the
handler that was attached to the module. A handler of an ordinary step is a :class:`LayerAttention`;
at start-up a probe takes its place to learn what the model's attention looks like.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from aptserve_kernels import (
    AttentionParams,
    DecodeBatch,
    Kernels,
    PrefillBatch,
    WriteSlots,
)
from aptserve_kernels.index import kv_slots
from aptserve_kernels.reference import project_keys
from torch import Tensor, nn
from transformers import AttentionInterface

from aptserve_worker.model.adapters import HiddenMaps
from aptserve_worker.model.state_maps import StateMaps
from aptserve_worker.parallel.group import RankGroup
from aptserve_worker.parallel.shard import Shard
from aptserve_worker.plan import Tier

ATTENTION_NAME = "aptserve"
_HANDLER = "aptserve_handler"
_HOOK = "aptserve_hook"


class Handler(Protocol):
    """Attention of one module: ``q`` ``[tokens, heads, head_dim]``, ``k`` and ``v`` alike."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> Tensor: ...

    def take_input(self, x: Tensor) -> None:
        """The module's input ``[tokens, hidden_size]``, before each call."""
        ...


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Rows ``[start, stop)`` of the flattened batch: sequences with one new token each."""

    start: int
    stop: int
    batch: DecodeBatch


@dataclass(frozen=True, slots=True)
class PrefillRows:
    """Rows ``[start, stop)``: new tokens of sequences, those of one after those of another."""

    start: int
    stop: int
    batch: PrefillBatch


@dataclass(frozen=True, slots=True)
class HiddenChunk:
    """Rows ``[start, stop)``: new tokens of one sequence after ``num_cached`` hidden states."""

    start: int
    stop: int
    num_cached: int
    table: Tensor
    batch: PrefillBatch
    """With the starts of the keys, cached and new."""


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """One iteration as attention sees it.

    Row order: decodes by tier, prompts of which nothing is cached, chunks of prompts by tier, those
    over hidden states last.
    """

    slots: WriteSlots
    decodes: Mapping[Tier, DecodeRows] = field(default_factory=dict)
    prompts: PrefillRows | None = None
    chunks: Mapping[Tier, PrefillRows] = field(default_factory=dict)
    hidden_chunks: Sequence[HiddenChunk] = ()


@dataclass(slots=True)
class StepContext:
    """Holds the step that is running; shared by the layers of one model."""

    step: AttentionStep | None = None


@dataclass(frozen=True, slots=True)
class Codes:
    """Scales ``[num_units, 2, heads_per_unit, block_size]`` of a layer, and the dtype of codes."""

    scales: Tensor
    dtype: torch.dtype


@dataclass(slots=True)
class LayerAttention:
    """Attention of one layer over its pool: of this rank's heads, over all tokens."""

    context: StepContext
    pool: Tensor
    codes: Codes | None
    """What the 8-bit tier needs, where it is offered."""
    shard: Shard
    group: RankGroup
    kernels: Kernels
    maps: HiddenMaps | None
    num_heads: int
    """Query heads of this rank."""
    _x: Tensor | None = None
    _params: dict[Any, AttentionParams] = field(default_factory=dict)
    _states: StateMaps | None = None

    def __post_init__(self) -> None:
        if self.maps is not None:
            self._states = StateMaps.of(self.maps, self.shard, self.group, self.num_heads)

    def take_input(self, x: Tensor) -> None:
        self._x = x

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> Tensor:
        step = self.context.step
        assert step is not None, "attention outside of a step"
        params = self._params_of(arguments)
        self._write(k, v, step.slots)
        num_rows = q.shape[0]
        parts: list[tuple[slice, Tensor]] = []
        for tier, decodes in step.decodes.items():
            rows = slice(decodes.start, decodes.stop)
            parts.append((rows, self._decode(tier, q[rows], decodes.batch, params)))
        if (prompts := step.prompts) is not None:
            rows = slice(prompts.start, prompts.stop)
            new = self.kernels.attend_ragged(q[rows], k[rows], v[rows], prompts.batch, params)
            parts.append((rows, new))
        for tier, chunks in step.chunks.items():
            rows = slice(chunks.start, chunks.stop)
            parts.append((rows, self._prefill(tier, q[rows], chunks.batch, params)))
        for chunk in step.hidden_chunks:
            rows = slice(chunk.start, chunk.stop)
            parts.append((rows, self._prefill_hidden(q[rows], k[rows], v[rows], chunk, params)))
        if len(parts) == 1 and parts[0][1].shape[0] == num_rows:
            return parts[0][1]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for rows, part in parts:
            out[rows] = part
        return out

    def _write(self, k: Tensor, v: Tensor, slots: WriteSlots) -> None:
        self.kernels.write_cache(self.pool, k, v, self._x, slots)
        if slots.kv8_slots is None:
            return
        assert self.codes is not None
        if slots.kv8_rows is not None:
            k, v = k.index_select(0, slots.kv8_rows), v.index_select(0, slots.kv8_rows)
        self.kernels.write_kv8(
            self.pool, self.codes.scales, k, v, slots.kv8_slots, self.shard.kv, self.codes.dtype
        )

    def _decode(self, tier: Tier, q: Tensor, batch: DecodeBatch, params: AttentionParams) -> Tensor:
        if tier is Tier.KV:
            return self.kernels.decode_kv(q, self.pool, batch, params)
        if tier is Tier.HIDDEN:
            return self._decode_hidden(q, batch, params)
        assert self.codes is not None
        scales, dtype = self.codes.scales, self.codes.dtype
        return self.kernels.decode_kv8(q, self.pool, scales, batch, params, dtype)

    def _prefill(
        self, tier: Tier, q: Tensor, batch: PrefillBatch, params: AttentionParams
    ) -> Tensor:
        if tier is Tier.KV:
            return self.kernels.prefill_kv(q, self.pool, batch, params)
        assert self.codes is not None
        scales, dtype = self.codes.scales, self.codes.dtype
        return self.kernels.prefill_kv8(q, self.pool, scales, batch, params, dtype)

    def _params_of(self, arguments: dict[str, Any]) -> AttentionParams:
        key = (
            arguments.get("scaling"),
            arguments.get("softcap"),
            arguments.get("sliding_window"),
        )
        if key not in self._params:
            scaling, softcap, window = key
            if scaling is None:
                scaling = self.shard.kv.head_dim**-0.5
            self._params[key] = AttentionParams(scaling, softcap, window)
        return self._params[key]

    def _decode_hidden(self, q: Tensor, batch: DecodeBatch, params: AttentionParams) -> Tensor:
        states = self._states
        assert states is not None
        if (ranks := self.group.size) == 1:
            return states.unfold(self._sum_states(q, batch, params, None))
        # This rank's tokens, with all heads; then this rank's heads, over all tokens.
        q = self.group.gather_heads(q)
        if params.window is not None:
            params = replace(params, window=params.window // ranks)
        log_sums = torch.empty(q.shape[:2], device=q.device)
        parts = states.unfold(self._sum_states(q, batch, params, log_sums))
        return self.group.join(parts, log_sums)

    def _sum_states(
        self, q: Tensor, batch: DecodeBatch, params: AttentionParams, log_sums: Tensor | None
    ) -> Tensor:
        """Hidden states ``[rows, heads, hidden_size]`` summed by the scores of ``q``."""
        states, kernels = self._states, self.kernels
        assert states is not None
        pool = self.shard.hidden_view(self.pool)
        if states.may_fold(params):
            return kernels.decode_hidden(states.fold(q), pool, batch, params, log_sums)
        return kernels.decode_projected(q, pool, batch, params, states.key, log_sums)

    def _prefill_hidden(
        self, q: Tensor, k: Tensor, v: Tensor, chunk: HiddenChunk, params: AttentionParams
    ) -> Tensor:
        # cached [0, num_cached) | new [num_cached, num_cached + rows)
        # Many query rows share the context: projecting it once costs less than folding each.
        x = self._gather_states(chunk.table, chunk.num_cached)
        old_k, old_v = self.project(x)
        both_k, both_v = torch.cat((old_k, k)), torch.cat((old_v, v))
        return self.kernels.attend_ragged(q, both_k, both_v, chunk.batch, params)

    def _gather_states(self, table: Tensor, num_tokens: int) -> Tensor:
        """The first ``num_tokens`` hidden states of a sequence, of all ranks."""
        pool, geometry = self.shard.hidden_view(self.pool), self.shard.hidden
        held = self.kernels.gather_hidden(pool, table, self.shard.most(num_tokens), geometry)
        return self.group.gather_tokens(held)[:num_tokens]

    def promote(self, hidden_table: Tensor, kv_table: Tensor, num_tokens: int) -> None:
        """Replace a sequence's hidden states by its keys and values."""
        assert self.maps is not None, "hidden states in a model without a hidden tier"
        key, value, geometry = self.maps.key, self.maps.value, self.shard.kv
        if self.group.size == 1:
            self.kernels.promote(
                self.pool, hidden_table, kv_table, num_tokens, key, value, geometry
            )
            return
        k, v = self.project(self._gather_states(hidden_table, num_tokens))
        positions = torch.arange(num_tokens, device=k.device)
        units = kv_table[positions // geometry.block_size]
        slots = kv_slots(units, positions % geometry.block_size, geometry)
        none = positions.new_zeros(0)
        self.kernels.write_cache(self.pool, k, v, None, WriteSlots(None, *slots, None, none))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[tokens, num_kv_heads, head_dim]`` of the first tokens of a sequence.

        ``x``: ``[tokens, hidden_size]``, its hidden states.
        """
        assert self.maps is not None, "hidden states in a model without a hidden tier"
        g = self.shard.kv
        positions = torch.arange(x.shape[0], device=x.device)
        k = project_keys(x, positions, self.maps.key, g.head_dim)
        return k, self.maps.value(x).view(-1, g.num_kv_heads, g.head_dim)


def attach(module: nn.Module, handler: Handler, *, with_input: bool) -> None:
    """Give ``module`` its handler, in place of an earlier one; with the module's input, if asked.

    The handler holds its layer's pool, so that the memory lives until :func:`detach_all`.
    """
    _detach(module)
    setattr(module, _HANDLER, handler)
    if not with_input:
        return

    def before_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        handler.take_input(x.reshape(-1, x.shape[-1]))

    setattr(module, _HOOK, module.register_forward_pre_hook(before_forward, with_kwargs=True))


def detach_all(model: nn.Module) -> None:
    """Take the handlers of a model's modules away, and with them what they hold."""
    for module in model.modules():
        _detach(module)


def _detach(module: nn.Module) -> None:
    hook = module.__dict__.pop(_HOOK, None)
    if hook is not None:
        hook.remove()
    module.__dict__.pop(_HANDLER, None)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls; ``query`` is ``[1, heads, tokens, head_dim]``."""
    handler: Handler = getattr(module, _HANDLER)
    out = handler(
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        arguments,
    )
    return out.unsqueeze(0), None


def register() -> None:
    """Make the attention function known to transformers under ``ATTENTION_NAME``.

    There is no mask function to it, so transformers makes none: sequences of a flattened batch are
    told apart by tables. (With one it would also look at the positions, and wait for the device.)
    """
    AttentionInterface.register(ATTENTION_NAME, _attention)
