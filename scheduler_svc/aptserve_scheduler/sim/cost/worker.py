"""Simulated workers by the names of a model and a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import TypeVar

from aptserve_scheduler.core import Tier, TierSpec, WorkerId, WorkerSpec
from aptserve_scheduler.sim.cost.estimate import fit_estimate
from aptserve_scheduler.sim.cost.hardware import BYTES_PER_NUMBER, GPUS, Gpu
from aptserve_scheduler.sim.cost.models import MODELS, ModelShape
from aptserve_scheduler.sim.cost.step import HOST_SECONDS, HiddenAttention, StepModel
from aptserve_scheduler.sim.worker import SimWorker

_T = TypeVar("_T")

_BYTES_PER_LOGIT = 4


def model_names() -> tuple[str, ...]:
    """Models that :func:`make_worker` knows."""
    return tuple(MODELS)


def gpu_names() -> tuple[str, ...]:
    """GPUs that :func:`make_worker` knows."""
    return tuple(GPUS)


def make_worker(
    model: str,
    gpu: str,
    *,
    tiers: Sequence[str] = ("kv", "hidden"),
    hidden_attention: str | None = None,
    block_size: int = 16,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 4096,
    memory_utilization: float = 0.9,
    tensor_parallel: int | None = None,
    host_seconds: float = HOST_SECONDS,
    worker_id: str = "sim-0",
) -> SimWorker:
    """A worker with this model on this GPU, in 16 bits.

    ``hidden_attention``: absorbed, reprojected or projected; by default the best that the model
    allows. ``tensor_parallel``: GPUs of the worker, by default the model's own number.
    ValueError for unknown names, for a model that does not fit, and for a hidden tier that cannot
    be computed in this way or that saves no memory.
    """
    shape = _look_up(MODELS, model, "model")
    device = _look_up(GPUS, gpu, "GPU")
    if not 0.0 < memory_utilization <= 1.0:
        raise ValueError(f"memory_utilization must be in (0, 1], not {memory_utilization}")
    ranks = _ranks(shape, device, tensor_parallel)
    chosen = _tiers(tiers)
    form = _hidden_attention(shape, chosen, ranks, hidden_attention)
    cost = StepModel(
        shape,
        device,
        tiers=chosen,
        hidden_attention=form,
        ranks=ranks,
        host_seconds=host_seconds,
    )
    width = _unit_width(shape, chosen, ranks)
    unit_bytes = BYTES_PER_NUMBER * block_size * width * shape.num_layers
    specs = tuple(TierSpec(tier, _tier_width(shape, tier, ranks) // width) for tier in chosen)
    taken = shape.weight_bytes / ranks + scratch_bytes(
        shape, chosen, form, ranks, max_num_seqs, max_num_batched_tokens
    )
    num_units = int((memory_utilization * device.memory_bytes - taken) // unit_bytes)
    if num_units < specs[0].units_per_block:
        raise ValueError(f"{model} leaves no memory for a cache on {ranks} x {gpu}")
    blocks = num_units // min(spec.units_per_block for spec in specs)
    estimate = fit_estimate(
        cost,
        chosen,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_cached_tokens=blocks * block_size,
    )
    spec = WorkerSpec(
        worker_id=WorkerId(worker_id),
        num_units=num_units,
        block_size=block_size,
        tiers=specs,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        cost=estimate.coefficients,
    )
    return SimWorker(spec, cost)


def scratch_bytes(
    model: ModelShape,
    tiers: Sequence[Tier],
    form: HiddenAttention,
    ranks: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> float:
    """Memory of a rank's intermediate results, of the largest layer and the output head.

    Per token: layer input, residual, norm and sum (d each), queries, keys and values, the MLP's
    two inner results. Per sequence: logits in 32 bits. A hidden tier adds keys and values of as
    many tokens as a batch has, projected piece by piece, and folded queries and sums of
    d numbers for every head where weights are folded.
    """
    d = model.hidden_size
    per_token = 4 * d + (d + 2 * model.kv_width + model.up_width + model.ffn_size) / ranks
    per_sequence = _BYTES_PER_LOGIT * model.vocab_size / ranks
    if Tier.HIDDEN in tiers:
        per_token += 2 * model.kv_width / ranks
        if form is not HiddenAttention.REPROJECTED:
            per_sequence += BYTES_PER_NUMBER * 2 * model.num_heads * d
    return BYTES_PER_NUMBER * per_token * max_num_batched_tokens + per_sequence * max_num_seqs


def _look_up(known: dict[str, _T], name: str, what: str) -> _T:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")
    return known[name]


def _ranks(model: ModelShape, gpu: Gpu, asked: int | None) -> int:
    ranks = model.tensor_parallel if asked is None else asked
    if ranks != 1 and ranks not in gpu.efficiency.links:
        known = ", ".join(map(str, (1, *gpu.efficiency.links)))
        raise ValueError(f"tensor_parallel {ranks} on {gpu.name} is not known, only {known}")
    return ranks


def _tiers(names: Sequence[str]) -> tuple[Tier, ...]:
    known = {tier.name.lower(): tier for tier in Tier}
    chosen = tuple(_look_up(known, name, "tier") for name in names)
    if not chosen or chosen[0] is not Tier.KV or len(set(chosen)) < len(chosen):
        raise ValueError(f"tiers must start with kv and name each once, not {', '.join(names)}")
    return chosen


def _hidden_attention(
    model: ModelShape, tiers: Sequence[Tier], ranks: int, name: str | None
) -> HiddenAttention:
    """The form asked for, or the model's best; ValueError where it cannot be or gains nothing."""
    forms = {form.value: form for form in HiddenAttention}
    best = HiddenAttention.PROJECTED if model.rotary else HiddenAttention.ABSORBED
    form = best if name is None else _look_up(forms, name, "hidden attention")
    if Tier.HIDDEN not in tiers:
        return form
    kv, hidden = (_tier_width(model, tier, ranks) for tier in (Tier.KV, Tier.HIDDEN))
    if hidden >= kv:
        why = "every one of its GPUs would hold all of them" if ranks > 1 else "its heads share KV"
        raise ValueError(
            f"a hidden tier saves no memory with {model.name} on {ranks} GPU(s): hidden states "
            f"take {hidden / kv:g} times the memory of keys and values, because {why}"
        )
    if form is HiddenAttention.ABSORBED and model.rotary:
        raise ValueError(
            f"absorbed attention cannot fold the rotary embedding of {model.name}: "
            "hidden_attention must be projected or reprojected"
        )
    return form


def _tier_width(model: ModelShape, tier: Tier, ranks: int) -> int:
    """Numbers that a rank keeps of a token and layer; hidden states are not split over ranks."""
    return model.hidden_size if tier is Tier.HIDDEN else 2 * model.kv_width // ranks


def _unit_width(model: ModelShape, tiers: Sequence[Tier], ranks: int) -> int:
    """Numbers of a unit's token: half of KV's, or the largest part that also divides a state."""
    width = model.kv_width // ranks
    return gcd(width, model.hidden_size) if Tier.HIDDEN in tiers else width
