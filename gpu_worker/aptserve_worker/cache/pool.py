"""The pool's tensors and its size."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from aptserve_kernels import UnitGeometry
from torch import Tensor

_DEFAULT_BYTES = 512 * 2**20


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
    bytes_per_unit: int,
    *,
    units: int | None,
    memory: int | None,
    left: Callable[[], int] | None = None,
) -> int:
    """Units of a pool: as asked for, else what fits the memory ``left``, or 512 MiB.

    ``left`` is asked only if neither was given; ValueError when not one unit fits.
    """
    if units is not None:
        return units
    if memory is None:
        memory = _DEFAULT_BYTES if left is None else left()
    if memory < bytes_per_unit:
        raise ValueError(
            f"{memory / 2**20:.0f} MiB are left for the cache pool and a unit takes "
            f"{bytes_per_unit / 2**20:.1f}: lower max_num_batched_tokens or max_num_seqs"
        )
    return memory // bytes_per_unit


def gpu_memory_left(device: torch.device, share: float, scratch: int) -> int:
    """Bytes for a pool on a GPU: its memory times ``share``, less what is in use and ``scratch``.

    What PyTorch holds without using it is given back first.
    """
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(share * total) - (total - free) - scratch
