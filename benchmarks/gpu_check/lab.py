"""What a single check of a kernel is, and what it is made with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from aptserve_kernels import AttentionParams, Kernels, resolve
from torch import Tensor

_T = TypeVar("_T")

TOLERANCES = {
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
    torch.float32: 5e-5,
}
"""Of a result near 1; of larger ones that share of them."""

PLAIN = AttentionParams(0.3)
WINDOW = AttentionParams(0.3, window=21)
CAPPED = AttentionParams(0.3, softcap=2.0)
BOTH = AttentionParams(0.3, softcap=1.5, window=70)


@dataclass(frozen=True, slots=True)
class Check:
    """``error`` runs a kernel and its twin and says how far apart they are."""

    kernel: str
    case: str
    tolerance: float
    error: Callable[[], float]

    def row(self) -> dict[str, Any]:
        """What came of it; an exception is a failure like any other."""
        found: dict[str, Any] = {"kernel": self.kernel, "case": self.case}
        try:
            error = self.error()
        except Exception as problem:
            text = (str(problem) or type(problem).__name__).strip().splitlines()[0]
            return {**found, "max_error": None, "tolerance": self.tolerance, "ok": False} | {
                "problem": f"{type(problem).__name__}: {text[:300]}"
            }
        return {
            **found,
            "max_error": error,
            "tolerance": self.tolerance,
            "ok": error <= self.tolerance,
        }


Checks = Iterable[Check]


@dataclass(frozen=True, slots=True)
class Lab:
    """One dtype on one device. Where it is dry, cases are small enough for an interpreter."""

    device: torch.device
    dtype: torch.dtype
    is_dry: bool

    @property
    def tolerance(self) -> float:
        """See ``TOLERANCES``."""
        return TOLERANCES[self.dtype]

    @property
    def kernels(self) -> Kernels:
        """Those under test."""
        return resolve(self.device, self.dtype, "triton")

    @property
    def name(self) -> str:
        """Of the dtype."""
        return str(self.dtype).removeprefix("torch.")

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal, in the dtype."""
        return (torch.randn(*shape, device=self.device) * scale).to(self.dtype)

    def pick(self, real: Sequence[_T], dry: Sequence[_T]) -> list[_T]:
        """Cases for a device, or for an interpreter."""
        return list(dry if self.is_dry else real)


def error_of(got: Tensor, wanted: Tensor) -> float:
    """The largest ``|got - wanted| / (1 + |wanted|)``; NaN equals NaN and nothing else."""
    if got.shape != wanted.shape:
        return float("inf")
    got, wanted = got.double(), wanted.double()
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    gaps = torch.where(same, 0.0, (got - wanted).abs() / (1 + wanted.abs()))
    return float(gaps.nan_to_num(nan=float("inf")).max()) if gaps.numel() else 0.0


def num_different(got: Tensor, wanted: Tensor) -> float:
    """Bytes that are not the same."""
    return float((got.view(torch.uint8) != wanted.view(torch.uint8)).sum())


def describe(params: AttentionParams) -> str:
    """What is not plain about them."""
    parts = [f"window {params.window}"] if params.window is not None else []
    parts += [f"soft-cap {params.softcap:g}"] if params.softcap is not None else []
    return "".join(f", {part}" for part in parts)
