"""The pool's tensors and its size."""

from __future__ import annotations

import numpy as np
import torch
from aptserve_kernels import UnitGeometry
from torch import Tensor

_DEFAULT_CPU_BYTES = 512 * 2**20
_DEFAULT_GPU_SHARE = 0.9


class UnitPool:
    """One tensor ``[num_units, block_size, unit_width]`` per layer; a unit number is valid in all.

    The memory starts as zeros, so that no stale bits can turn into NaN.
    """

    def __init__(
        self,
        geometry: UnitGeometry,
        num_layers: int,
        num_units: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.geometry = geometry
        self.num_units = num_units
        shape = (num_units, geometry.block_size, geometry.unit_width)
        self.layers: list[Tensor] = [_zeros(shape, device, dtype) for _ in range(num_layers)]


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros; on a CPU pages of memory that are taken only once they are written."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    memory = np.zeros(int(np.prod(shape)) * dtype.itemsize, np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)


def unit_bytes(geometry: UnitGeometry, num_layers: int, dtype: torch.dtype) -> int:
    """Bytes of one unit in all layers together."""
    return geometry.unit_elements * num_layers * dtype.itemsize


def choose_num_units(
    bytes_per_unit: int, device: torch.device, *, units: int | None, memory: int | None
) -> int:
    """Units of a pool: as asked for, else 512 MiB on a CPU or 90 % of what a GPU has free."""
    if units is not None:
        return units
    if memory is None:
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            memory = int(free * _DEFAULT_GPU_SHARE)
        else:
            memory = _DEFAULT_CPU_BYTES
    return max(1, memory // bytes_per_unit)
