"""What a kernel is compiled as: the list that ships, compiled without a GPU in tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
"""A100, H100 and H200, B200, MI300."""

DTYPES: Mapping[torch.dtype, str] = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
}
"""Dtypes of caches and activations, by their names in a signature."""

HEAD_DIMS = (64, 80, 96, 128, 256)
BLOCK_SIZES = (16, 32, 64)


@dataclass(frozen=True, slots=True)
class KernelVariant:
    """One shipped configuration of a kernel.

    ``signature`` maps every argument that is no constant to its type (``*bf16``, ``i32``, ``i64``,
    ``fp32``); ``constants`` are the ``tl.constexpr`` arguments. ``targets`` names the GPUs that the
    variant is for, all unless an instruction is missing somewhere.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    targets: tuple[str, ...] = field(default=TARGETS)
