"""A loaded model with our caches under it: tokens in, logits out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import structlog
import torch
from aptserve_kernels import UnitGeometry, WriteSlots, resolve
from torch import Tensor, nn

from aptserve_worker.cache.pool import UnitPool, choose_num_units, unit_bytes
from aptserve_worker.model.adapters import AttentionCall, HiddenMaps, find_hidden_maps
from aptserve_worker.model.attention import (
    AttentionStep,
    LayerAttention,
    StepContext,
    attach,
)
from aptserve_worker.model.loading import LoadedModel
from aptserve_worker.model.probe import UnsupportedModelError, probe
from aptserve_worker.model.step import kv_slots
from aptserve_worker.plan import Tier

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """What the operator asked for; None leaves the choice to the worker."""

    block_size: int
    units: int | None = None
    memory_bytes: int | None = None
    tiers: Sequence[Tier] | None = None


class ModelRunner:
    """Owns the weights, the pool's tensors and the handlers between them."""

    def __init__(self, loaded: LoadedModel, settings: PoolSettings) -> None:
        """Attach caches to ``loaded``. Raises :class:`UnsupportedModelError`."""
        self._model = loaded.model
        parameter = next(self._model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        with torch.inference_mode():
            calls = probe(self._model, loaded.vocab_size)
            maps = _hidden_maps(self._model, calls, loaded.context_length)
        self.geometry = _geometry(calls, settings.block_size)
        self.units_per_block = _tiers(self.geometry, maps, settings.tiers)
        self.unit_bytes = unit_bytes(self.geometry, len(calls), self.dtype)
        self._kernels = resolve(self.device, self.dtype)
        num_packed = self._kernels.pack_linears(self._model)
        self.pool = UnitPool(
            self.geometry,
            len(calls),
            choose_num_units(
                self.unit_bytes, self.device, units=settings.units, memory=settings.memory_bytes
            ),
            device=self.device,
            dtype=self.dtype,
        )
        self._context = StepContext()
        self._layers = self._attach(calls, maps if Tier.HIDDEN in self.units_per_block else None)
        self._keeps_logits = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        log.info(
            "model.attached",
            layers=len(calls),
            packed_linears=num_packed,
            tiers=[tier.name.lower() for tier in self.units_per_block],
            num_units=self.pool.num_units,
            unit_bytes=self.unit_bytes,
        )

    def _attach(
        self, calls: Sequence[AttentionCall], maps: Sequence[HiddenMaps] | None
    ) -> list[LayerAttention]:
        layers = []
        for index, call in enumerate(calls):
            layer = LayerAttention(
                context=self._context,
                pool=self.pool.layers[index],
                geometry=self.geometry,
                kernels=self._kernels,
                maps=None if maps is None else maps[index],
                num_heads=call.num_heads,
            )
            attach(call.module, layer, with_input=maps is not None)
            layers.append(layer)
        return layers

    @torch.inference_mode()
    def forward(
        self, token_ids: Tensor, positions: Tensor, step: AttentionStep, logit_rows: Tensor
    ) -> Tensor:
        """Logits ``[len(logit_rows), vocab_size]`` in float32 of the rows asked for.

        ``token_ids``, ``positions``: ``[rows]``, the flattened batch.
        """
        self._context.step = step
        arguments = {"logits_to_keep": logit_rows} if self._keeps_logits else {}
        try:
            logits: Tensor = self._model(
                input_ids=token_ids.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                use_cache=False,
                **arguments,
            ).logits.squeeze(0)
        finally:
            self._context.step = None
        return (logits if self._keeps_logits else logits.index_select(0, logit_rows)).float()

    @torch.inference_mode()
    def promote(self, hidden_table: Tensor, kv_table: Tensor, num_tokens: int) -> None:
        """Project a sequence's hidden states to keys and values, in every layer.

        ``hidden_table``: ``[blocks, hidden_units]``, ``kv_table``: ``[blocks, kv_units]``; they may
        share units, since a layer is read as a whole before it is written.
        """
        tokens = torch.arange(num_tokens, device=self.device)
        size = self.geometry.block_size
        hidden_table, kv_table = hidden_table.to(self.device), kv_table.to(self.device)
        keys, values = kv_slots(kv_table[tokens // size], tokens % size, self.geometry)
        none = keys.new_zeros(0)
        slots = WriteSlots(None, keys, values, None, none)
        for layer in self._layers:
            x = self._kernels.gather_hidden(
                layer.pool, hidden_table, num_tokens, self.geometry
            ).clone()
            k, v = layer.project(x)
            self._kernels.write_cache(layer.pool, k, v, None, slots)


def _geometry(calls: Sequence[AttentionCall], block_size: int) -> UnitGeometry:
    kv_heads, head_dim = calls[0].k.shape[1:]
    return UnitGeometry.of(
        block_size=block_size,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=calls[0].x.shape[-1],
    )


def _tiers(
    geometry: UnitGeometry, maps: Sequence[HiddenMaps] | None, asked: Sequence[Tier] | None
) -> dict[Tier, int]:
    """Units per block of each tier to offer, KV first. Raises :class:`UnsupportedModelError`."""
    possible = {Tier.KV: geometry.kv_units}
    if geometry.hidden_units and maps is not None:
        possible[Tier.HIDDEN] = geometry.hidden_units
    if asked is None:
        return possible
    for tier in asked:
        if tier not in possible:
            reason = (
                "its hidden states are not smaller than its keys and values"
                if not geometry.hidden_units
                else "its keys and values could not be reproduced from hidden states"
            )
            raise UnsupportedModelError(
                f"This model has no {tier.name.lower()} tier: {reason}; use --tiers kv."
            )
    if not asked:
        raise UnsupportedModelError("--tiers names no tier.")
    return {tier: possible[tier] for tier in sorted(set(asked))}


def _hidden_maps(
    model: nn.Module, calls: Sequence[AttentionCall], context_length: int
) -> list[HiddenMaps] | None:
    rotary = _rotary_tables(model, context_length, calls[0].x)
    maps = [find_hidden_maps(call, rotary) for call in calls]
    found = [m for m in maps if m is not None]
    return found if len(found) == len(calls) else None


def _rotary_tables(
    model: nn.Module, context_length: int, like: Tensor
) -> tuple[Tensor, Tensor] | None:
    """cos and sin ``[context_length, rotary_dim]`` if the model has one rotary embedding."""
    modules = [m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")]
    if len(modules) != 1:
        return None
    positions = torch.arange(context_length, device=like.device).unsqueeze(0)
    try:
        cos, sin = modules[0](like.unsqueeze(0), positions)
    except (TypeError, ValueError, KeyError, RuntimeError):  # wants more than positions
        return None
    return cos.squeeze(0), sin.squeeze(0)
