"""Which implementation of each operation runs on which device and dtype: one table."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cache
from importlib import import_module
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from aptserve_kernels import cpu, promotion, quantised, reference, sampling
from aptserve_kernels.batch import (
    AttentionParams,
    DecodeBatch,
    KeyProjection,
    LinearMap,
    PrefillBatch,
    WriteSlots,
)
from aptserve_kernels.geometry import UnitGeometry
from aptserve_kernels.linear import pack_linears
from aptserve_kernels.sampling import SamplingBatch


class WriteCache(Protocol):
    """See :func:`aptserve_kernels.reference.write_cache`."""

    def __call__(
        self, pool: Tensor, k: Tensor, v: Tensor, x: Tensor | None, slots: WriteSlots
    ) -> None: ...


class GatherHidden(Protocol):
    """See :func:`aptserve_kernels.reference.gather_hidden`."""

    def __call__(
        self, pool: Tensor, table: Tensor, num_tokens: int, geometry: UnitGeometry
    ) -> Tensor: ...


class AttendRagged(Protocol):
    """See :func:`aptserve_kernels.reference.attend_ragged`."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, batch: PrefillBatch, params: AttentionParams
    ) -> Tensor: ...


class Prefill(Protocol):
    """See :func:`aptserve_kernels.reference.prefill_kv`."""

    def __call__(
        self, q: Tensor, pool: Tensor, batch: PrefillBatch, params: AttentionParams
    ) -> Tensor: ...


class WriteKv8(Protocol):
    """See :func:`aptserve_kernels.quantised.write_kv8`."""

    def __call__(
        self,
        pool: Tensor,
        scales: Tensor,
        k: Tensor,
        v: Tensor,
        slots: Tensor,
        geometry: UnitGeometry,
        code_dtype: torch.dtype,
        /,
    ) -> None: ...


class PrefillKv8(Protocol):
    """See :func:`aptserve_kernels.reference.prefill_kv8`."""

    def __call__(
        self,
        q: Tensor,
        pool: Tensor,
        scales: Tensor,
        batch: PrefillBatch,
        params: AttentionParams,
        code_dtype: torch.dtype,
    ) -> Tensor: ...


class DecodeKv8(Protocol):
    """See :func:`aptserve_kernels.reference.decode_kv8`."""

    def __call__(
        self,
        q: Tensor,
        pool: Tensor,
        scales: Tensor,
        batch: DecodeBatch,
        params: AttentionParams,
        code_dtype: torch.dtype,
    ) -> Tensor: ...


class Promote(Protocol):
    """See :func:`aptserve_kernels.promotion.promote`."""

    def __call__(
        self,
        pool: Tensor,
        hidden_table: Tensor,
        kv_table: Tensor,
        num_tokens: int,
        key: KeyProjection,
        value: LinearMap,
        geometry: UnitGeometry,
    ) -> None: ...


class DecodeKv(Protocol):
    """See :func:`aptserve_kernels.reference.decode_kv`."""

    def __call__(
        self, q: Tensor, pool: Tensor, batch: DecodeBatch, params: AttentionParams
    ) -> Tensor: ...


class DecodeHidden(Protocol):
    """See :func:`aptserve_kernels.reference.decode_hidden`."""

    def __call__(
        self,
        folded: Tensor,
        pool: Tensor,
        batch: DecodeBatch,
        params: AttentionParams,
        log_sums: Tensor | None = None,
    ) -> Tensor: ...


class DecodeProjected(Protocol):
    """See :func:`aptserve_kernels.reference.decode_projected`."""

    def __call__(
        self,
        q: Tensor,
        pool: Tensor,
        batch: DecodeBatch,
        params: AttentionParams,
        projection: KeyProjection,
        log_sums: Tensor | None = None,
    ) -> Tensor: ...


class Sample(Protocol):
    """See :func:`aptserve_kernels.sampling.sample`."""

    def __call__(self, logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]: ...


class CountTokens(Protocol):
    """See :func:`aptserve_kernels.sampling.count_tokens`."""

    def __call__(self, counts: Tensor, rows: Tensor, token_ids: Tensor) -> None: ...


class PackLinears(Protocol):
    """See :func:`aptserve_kernels.linear.pack_linears`."""

    def __call__(self, model: torch.nn.Module) -> int: ...


def _keep_linears(model: torch.nn.Module) -> int:
    """No packing: the device's own library takes the weights as they are."""
    return 0


@dataclass(frozen=True, slots=True)
class Kernels:
    """The operations of one device and dtype. The defaults are the reference."""

    write_cache: WriteCache = field(default=reference.write_cache)
    gather_hidden: GatherHidden = field(default=reference.gather_hidden)
    attend_ragged: AttendRagged = field(default=reference.attend_ragged)
    prefill_kv: Prefill = field(default=reference.prefill_kv)
    decode_kv: DecodeKv = field(default=reference.decode_kv)
    decode_hidden: DecodeHidden = field(default=reference.decode_hidden)
    decode_projected: DecodeProjected = field(default=reference.decode_projected)
    promote: Promote = field(default=promotion.promote)
    write_kv8: WriteKv8 = field(default=quantised.write_kv8)
    prefill_kv8: PrefillKv8 = field(default=reference.prefill_kv8)
    decode_kv8: DecodeKv8 = field(default=reference.decode_kv8)
    sample: Sample = field(default=sampling.sample)
    count_tokens: CountTokens = field(default=sampling.count_tokens)
    pack_linears: PackLinears = field(default=_keep_linears)


Backend = Literal["auto", "reference", "cpu", "triton"]
"""Columns of the table; ``auto`` is the fastest for the device."""

_16_BITS = (torch.bfloat16, torch.float16)
_ON_GPU = (*_16_BITS, torch.float32)

_TABLE: dict[tuple[str, str], tuple[Any, tuple[torch.dtype, ...]]] = {
    ("attend_ragged", "cpu"): (cpu.attend_ragged, (torch.float32,)),
    ("prefill_kv", "cpu"): (cpu.prefill_kv, (torch.float32,)),
    ("decode_kv", "cpu"): (cpu.decode_kv, (torch.float32,)),
    ("decode_hidden", "cpu"): (cpu.decode_hidden, (torch.float32,)),
    ("decode_projected", "cpu"): (cpu.decode_projected, (torch.float32,)),
    ("prefill_kv8", "cpu"): (cpu.prefill_kv8, (torch.float32,)),
    ("decode_kv8", "cpu"): (cpu.decode_kv8, (torch.float32,)),
    ("pack_linears", "cpu"): (pack_linears, (torch.float32,)),
    ("write_cache", "triton"): ("write", _ON_GPU),
    ("gather_hidden", "triton"): ("gather", _ON_GPU),
    ("attend_ragged", "triton"): ("prefill", _ON_GPU),
    ("prefill_kv", "triton"): ("prefill", _ON_GPU),
    ("decode_kv", "triton"): ("decode_kv", _ON_GPU),
    ("decode_hidden", "triton"): ("decode_hidden", _ON_GPU),
    ("decode_projected", "triton"): ("decode_projected", _ON_GPU),
    ("promote", "triton"): ("promote", _ON_GPU),
    ("write_kv8", "triton"): ("write_kv8", _16_BITS),
    ("prefill_kv8", "triton"): ("prefill", _16_BITS),
    ("decode_kv8", "triton"): ("decode_kv", _16_BITS),
    ("sample", "triton"): ("sample", _ON_GPU),
    ("count_tokens", "triton"): ("adjust", _ON_GPU),
}
"""(operation, backend) → implementation, and for which dtypes; what is not here runs as the
reference. A name is a module of :mod:`aptserve_kernels.gpu` that has a function called like the
operation; it is imported when first asked for, since Triton is not everywhere."""


def resolve(device: torch.device, dtype: torch.dtype, backend: Backend = "auto") -> Kernels:
    """The operations for a device and dtype.

    ``auto``: Triton on a GPU, the tuned forms on a CPU. ``reference``: the plain form of all, the
    oracle for the others. ``triton`` on a CPU works only under Triton's interpreter.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, not {backend!r}")
    if backend == "auto":
        backend = "cpu" if device.type == "cpu" else "triton"
    chosen = {}
    for operation in fields(Kernels):
        found, dtypes = _TABLE.get((operation.name, backend), (None, ()))
        if dtype in dtypes:
            chosen[operation.name] = _loaded(found, operation.name)
    return Kernels(**chosen)


def refused_by_triton(geometry: UnitGeometry) -> str | None:
    """Why the Triton kernels cannot serve a geometry; None when they can."""
    g = geometry
    if g.head_dim % 16 or g.head_dim > 256:
        return f"a head size of {g.head_dim}, where multiples of 16 up to 256 are compiled"
    if g.block_size & (g.block_size - 1):
        return f"a block size of {g.block_size}, where powers of two are compiled"
    return None


@cache
def _loaded(found: Any, operation: str) -> Any:
    if not isinstance(found, str):
        return found
    return getattr(import_module(f"aptserve_kernels.gpu.{found}"), operation)
