"""Attention over paged key-value and hidden-state caches, and the products around it.

Every operation has a plain torch reference; :func:`resolve` picks the best implementation for a
device and dtype from one table.
"""

from aptserve_kernels.batch import (
    AttentionParams,
    DecodeBatch,
    KeyProjection,
    LinearMap,
    Rotary,
    WriteSlots,
)
from aptserve_kernels.dispatch import Kernels, resolve
from aptserve_kernels.geometry import UnitGeometry

__all__ = [
    "AttentionParams",
    "DecodeBatch",
    "Kernels",
    "KeyProjection",
    "LinearMap",
    "Rotary",
    "UnitGeometry",
    "WriteSlots",
    "resolve",
]
