"""The table of implementations: complete, importable, and of one signature per operation."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
import torch
from aptserve_kernels import Kernels, UnitGeometry, dispatch, refused_by_triton, resolve

CPU = torch.device("cpu")
OPERATIONS = {operation.name for operation in fields(Kernels)}


def test_every_entry_is_of_an_operation() -> None:
    assert {operation for operation, _ in dispatch._TABLE} <= OPERATIONS
    assert {backend for _, backend in dispatch._TABLE} == {"cpu", "triton"}


@pytest.mark.parametrize(("operation", "backend"), sorted(dispatch._TABLE))
def test_an_implementation_is_called_like_the_reference(operation: str, backend: str) -> None:
    _, dtypes = dispatch._TABLE[operation, backend]
    for dtype in dtypes:
        found = getattr(resolve(CPU, dtype, backend), operation)  # type: ignore[arg-type]
        plain = getattr(Kernels(), operation)
        assert found is not plain
        names = list(inspect.signature(found).parameters)
        # The plain form may take more: what it attends with.
        assert list(inspect.signature(plain).parameters)[: len(names)] == names


def test_what_is_missing_runs_as_the_reference() -> None:
    assert resolve(CPU, torch.bfloat16) == Kernels()
    assert resolve(CPU, torch.float32, "reference") == Kernels()
    in_32_bits = resolve(CPU, torch.float32, "triton")
    assert in_32_bits.decode_kv8 is Kernels().decode_kv8
    assert in_32_bits.decode_kv is not Kernels().decode_kv


def test_a_gpu_gets_kernels_and_a_cpu_its_own_forms() -> None:
    on_gpu = resolve(torch.device("cuda"), torch.bfloat16)
    assert on_gpu.decode_kv.__module__ == "aptserve_kernels.gpu.decode_kv"  # type: ignore[attr-defined]
    assert resolve(CPU, torch.float32).decode_kv.__module__ == "aptserve_kernels.cpu"  # type: ignore[attr-defined]


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of auto, .*, not 'cuda'"):
        resolve(CPU, torch.float32, "cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("head_dim", "block_size", "reason"),
    [
        (64, 16, None),
        (80, 64, None),
        (256, 1, None),
        (72, 16, "a head size of 72"),
        (272, 16, "a head size of 272"),
        (64, 24, "a block size of 24"),
    ],
)
def test_sizes_without_a_kernel(head_dim: int, block_size: int, reason: str | None) -> None:
    geometry = UnitGeometry.of(
        block_size=block_size, num_kv_heads=2, head_dim=head_dim, hidden_size=4 * head_dim
    )
    refused = refused_by_triton(geometry)
    assert (refused or "").startswith(reason or "")
    assert (refused is None) == (reason is None)
