"""A loaded model with our caches under it: tokens in, logits out."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import structlog
import torch
from aptserve_kernels import Backend, UnitGeometry, refused_by_triton, resolve
from aptserve_kernels.quantised import new_scales, scale_bytes
from torch import Tensor, nn

from aptserve_worker.cache.pool import UnitPool, choose_num_units, gpu_memory_left, unit_bytes
from aptserve_worker.model.adapters import AttentionCall, HiddenMaps, find_hidden_maps
from aptserve_worker.model.attention import (
    AttentionStep,
    Codes,
    LayerAttention,
    StepContext,
    attach,
)
from aptserve_worker.model.loading import LoadedModel
from aptserve_worker.model.probe import UnsupportedModelError, probe
from aptserve_worker.model.scratch import Limits, cuda_meter, scratch_bytes
from aptserve_worker.parallel.group import ALONE, RankGroup
from aptserve_worker.parallel.shard import Shard
from aptserve_worker.plan import Tier

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """What the operator asked for; None leaves the choice to the worker."""

    block_size: int
    limits: Limits
    units: int | None = None
    memory_bytes: int | None = None
    tiers: Sequence[Tier] | None = None
    code_dtype: torch.dtype = torch.int8
    """What the 8-bit tier holds."""
    records_steps: bool = False
    """Whether decode steps will be recorded, which takes scratch memory of its own."""
    gpu_memory_share: float = 0.9
    """Of a GPU's memory, what weights, scratch and pool together may take."""


class ModelRunner:
    """Owns the weights, the pool's tensors and the handlers between them."""

    def __init__(
        self,
        loaded: LoadedModel,
        settings: PoolSettings,
        backend: Backend = "auto",
        group: RankGroup = ALONE,
    ) -> None:
        """Attach caches to ``loaded``. Raises :class:`UnsupportedModelError`."""
        self._model = loaded.model
        self._group = group
        parameter = next(self._model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        with torch.inference_mode():
            calls = probe(self._model, loaded.vocab_size)
            maps = _hidden_maps(self._model, calls, loaded.context_length)
        if not group.least(int(maps is not None), self.device):
            maps = None
        self.shard = _shard(calls, settings.block_size, loaded, group)
        self.units_per_block = _tiers(self.shard.kv, maps, settings.tiers)
        self.unit_bytes = unit_bytes(self.shard.kv, len(calls), self.dtype)
        has_codes = Tier.KV8 in self.units_per_block
        if has_codes:
            _check_code_dtype(settings.code_dtype, self.device)
            self.unit_bytes += len(calls) * scale_bytes(self.shard.kv)
        self.kernels = resolve(self.device, self.dtype, self._backend(backend))
        num_packed = self.kernels.pack_linears(self._model)
        self._code_dtype = settings.code_dtype if has_codes else None
        self._context = StepContext()
        self._keeps_logits = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self.pool = self._new_pool(len(calls), 1)
        self._layers = self._attach(calls, maps if Tier.HIDDEN in self.units_per_block else None)
        num_units = group.least(self._choose_num_units(settings), self.device)
        self.pool = self._new_pool(len(calls), num_units)
        for layer, memory in zip(self._layers, self.pool.layers, strict=True):
            layer.pool, layer.codes = memory, self._new_codes()
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
                codes=self._new_codes(),
                shard=self.shard,
                group=self._group,
                kernels=self.kernels,
                maps=None if maps is None else maps[index],
                num_heads=call.num_heads,
            )
            attach(call.module, layer, with_input=maps is not None)
            layers.append(layer)
        return layers

    def _backend(self, asked: Backend) -> Backend:
        """What was asked for; by itself the worker falls back where kernels do not fit."""
        refused = self._refused_by_triton()
        if asked == "cpu" and self.device.type != "cpu":
            raise UnsupportedModelError("--kernels cpu needs --device cpu.")
        if asked == "triton" and self.device.type == "cpu" and not _is_interpreted():
            raise UnsupportedModelError("--kernels triton needs a GPU.")
        if asked == "triton" and refused:
            raise UnsupportedModelError(f"--kernels triton cannot serve {refused}.")
        if asked == "auto" and self.device.type == "cuda" and refused:
            log.warning("kernels.plain", reason=f"no kernel for {refused}")
            return "reference"
        return asked

    def _refused_by_triton(self) -> str | None:
        shard = self.shard
        return refused_by_triton(shard.kv) or refused_by_triton(shard.hidden)

    def _new_pool(self, num_layers: int, num_units: int) -> UnitPool:
        return UnitPool(self.shard.kv, num_layers, num_units, device=self.device, dtype=self.dtype)

    def _choose_num_units(self, settings: PoolSettings) -> int:
        """Units of the pool. Raises :class:`UnsupportedModelError` when there is no memory."""

        def left() -> int:
            scratch = scratch_bytes(
                self.forward,
                self.shard,
                self.units_per_block,
                settings.limits,
                self.device,
                cuda_meter(self.device),
            )
            log.info("model.scratch", scratch_bytes=scratch)
            if settings.records_steps:
                scratch *= 2  # recorded steps keep what they need to themselves
            return gpu_memory_left(self.device, settings.gpu_memory_share, scratch)

        try:
            return choose_num_units(
                self.unit_bytes,
                units=settings.units,
                memory=settings.memory_bytes,
                left=left if self.device.type == "cuda" else None,
            )
        except ValueError as error:
            raise UnsupportedModelError(str(error)) from None

    def _new_codes(self) -> Codes | None:
        if self._code_dtype is None:
            return None
        scales = new_scales(self.pool.num_units, self.shard.kv, self.device)
        return Codes(scales, self._code_dtype)

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
        hidden_table, kv_table = hidden_table.to(self.device), kv_table.to(self.device)
        for layer in self._layers:
            layer.promote(hidden_table, kv_table, num_tokens)


def _is_interpreted() -> bool:
    """Whether Triton's kernels run on a CPU, through its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _check_code_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Raises :class:`UnsupportedModelError` for codes that the GPU cannot convert."""
    if dtype is torch.int8 or device.type != "cuda":
        return
    if torch.cuda.get_device_capability(device) < (8, 9):
        raise UnsupportedModelError(
            "--kv8-format fp8 needs a GPU of compute capability 8.9 or later; use int8."
        )


def _shard(
    calls: Sequence[AttentionCall], block_size: int, loaded: LoadedModel, group: RankGroup
) -> Shard:
    """This rank's part of the cache. Raises :class:`UnsupportedModelError`."""
    kv_heads, head_dim = calls[0].k.shape[1:]
    hidden_size, num_heads = calls[0].x.shape[-1], calls[0].num_heads

    def geometry(num_kv_heads: int) -> UnitGeometry:
        return UnitGeometry.of(
            block_size=block_size,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            hidden_size=hidden_size,
        )

    if group.size == 1:
        return Shard.alone(geometry(kv_heads))
    if num_heads == loaded.config.num_attention_heads:
        log.warning(
            "ranks.whole_caches", reason="the model's plan leaves attention whole on every rank"
        )
        return Shard.alone(replace(geometry(kv_heads), hidden_units=0))
    shard = Shard.of(group.rank, group.size, geometry(kv_heads * group.size))
    if any(call.window is not None and call.window % group.size for call in calls):
        return replace(shard, kv=replace(shard.kv, hidden_units=0))
    return shard


def _tiers(
    geometry: UnitGeometry, maps: Sequence[HiddenMaps] | None, asked: Sequence[Tier] | None
) -> dict[Tier, int]:
    """Units per block of each tier to offer, KV first. Raises :class:`UnsupportedModelError`.

    Left to itself the worker offers exact tiers only.
    """
    possible = {Tier.KV: geometry.kv_units}
    if geometry.hidden_units and maps is not None:
        possible[Tier.HIDDEN] = geometry.hidden_units
    if asked is None:
        return possible
    possible[Tier.KV8] = geometry.key_units
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
