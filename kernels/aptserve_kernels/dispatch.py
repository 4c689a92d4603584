"""Which implementation of each operation runs on which device and dtype: one table."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from aptserve_kernels import cpu, reference
from aptserve_kernels.batch import AttentionParams, DecodeBatch, KeyProjection, WriteSlots
from aptserve_kernels.geometry import UnitGeometry
from aptserve_kernels.linear import pack_linears


class WriteCache(Protocol):
    """See :func:`aptserve_kernels.reference.write_cache`."""

    def __call__(
        self, pool: Tensor, k: Tensor, v: Tensor, x: Tensor | None, slots: WriteSlots
    ) -> None: ...


class GatherKv(Protocol):
    """See :func:`aptserve_kernels.reference.gather_kv`."""

    def __call__(
        self, pool: Tensor, table: Tensor, num_tokens: int, geometry: UnitGeometry
    ) -> tuple[Tensor, Tensor]: ...


class GatherHidden(Protocol):
    """See :func:`aptserve_kernels.reference.gather_hidden`."""

    def __call__(
        self, pool: Tensor, table: Tensor, num_tokens: int, geometry: UnitGeometry
    ) -> Tensor: ...


class Attend(Protocol):
    """See :func:`aptserve_kernels.reference.attend`."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor: ...


class Decode(Protocol):
    """See ``decode_kv`` and ``decode_hidden`` in :mod:`aptserve_kernels.reference`."""

    def __call__(
        self, q: Tensor, pool: Tensor, batch: DecodeBatch, params: AttentionParams, /
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
    ) -> Tensor: ...


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
    gather_kv: GatherKv = field(default=reference.gather_kv)
    gather_hidden: GatherHidden = field(default=reference.gather_hidden)
    attend: Attend = field(default=reference.attend)
    decode_kv: Decode = field(default=reference.decode_kv)
    decode_hidden: Decode = field(default=reference.decode_hidden)
    decode_projected: DecodeProjected = field(default=reference.decode_projected)
    pack_linears: PackLinears = field(default=_keep_linears)


_TABLE: dict[tuple[str, str, torch.dtype], Any] = {
    ("attend", "cpu", torch.float32): cpu.attend,
    ("decode_kv", "cpu", torch.float32): cpu.decode_kv,
    ("decode_hidden", "cpu", torch.float32): cpu.decode_hidden,
    ("decode_projected", "cpu", torch.float32): cpu.decode_projected,
    ("pack_linears", "cpu", torch.float32): pack_linears,
}
"""(operation, device type, dtype) → implementation; what is not here runs as the reference."""


def resolve(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The operations for a device and dtype."""
    chosen = {
        f.name: _TABLE[f.name, device.type, dtype]
        for f in fields(Kernels)
        if (f.name, device.type, dtype) in _TABLE
    }
    return Kernels(**chosen)
