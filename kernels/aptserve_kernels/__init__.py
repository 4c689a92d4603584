"""Attention over paged key-value and hidden-state caches, and the products around it.

Every operation has a plain torch reference; :func:`resolve` picks the best implementation for a
device and dtype from one table.
"""

from aptserve_kernels.batch import (
    AttentionParams,
    DecodeBatch,
    HeadNorm,
    KeyProjection,
    LinearMap,
    PrefillBatch,
    Rotary,
    WriteSlots,
)
from aptserve_kernels.dispatch import Backend, Kernels, refused_by_triton, resolve
from aptserve_kernels.geometry import UnitGeometry

__all__ = [
    "AttentionParams",
    "Backend",
    "DecodeBatch",
    "HeadNorm",
    "Kernels",
    "KeyProjection",
    "LinearMap",
    "PrefillBatch",
    "Rotary",
    "UnitGeometry",
    "WriteSlots",
    "refused_by_triton",
    "resolve",
]
