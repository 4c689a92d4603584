"""What a compiled kernel asks of a GPU: registers, shared memory, and what registers did not hold.

The GPU need not be there. Shared memory is what Triton's metadata says a launch will ask for. The
rest is read from the compiled object:

- CUDA: ``cuobjdump --dump-resource-usage``, which comes with Triton. Its STACK is where ptxas puts
  what it spills (the "bytes stack frame" of ``ptxas -v``; LOCAL stays 0), and a Triton kernel that
  neither prints nor calls keeps nothing else there.
- HIP: the metadata of the code object, at the end of the assembly. A spilled register is 4 bytes.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aptserve_kernels.gpu.variants import KernelVariant

_KIB = 1024
_TENSOR_COLUMNS = 512
"""Of a multiprocessor of sm_100."""
_DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of GPU, and what a kernel may ask of it.

    ``max_shared_bytes`` are those that one block can be given. ``may_spill``: whether spills are
    only reported.
    """

    gpu: GPUTarget
    max_shared_bytes: int
    may_spill: bool


TARGETS: Mapping[str, Target] = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * _KIB, may_spill=False),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * _KIB, may_spill=False),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * _KIB, may_spill=True),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * _KIB, may_spill=True),
}
"""Limits of CUDA: table of compute capabilities in the CUDA C++ Programming Guide. Of gfx942: the
local data share of a CDNA 3 compute unit."""


@dataclass(frozen=True, slots=True)
class Resources:
    """Needs of one compiled kernel: ``registers`` and ``spill_bytes`` of a thread, the rest of a
    block. Tensor memory, which holds accumulators on sm_100, is counted in columns.
    """

    registers: int
    shared_bytes: int
    spill_bytes: int
    tensor_columns: int = 0

    def problems(self, target: Target) -> list[str]:
        """What the target cannot give, or should not have to."""
        found = []
        limit = target.max_shared_bytes
        if self.shared_bytes > limit:
            found.append(f"{self.shared_bytes} bytes of shared memory, of at most {limit}")
        if self.tensor_columns > _TENSOR_COLUMNS:
            found.append(
                f"{self.tensor_columns} columns of tensor memory, of at most {_TENSOR_COLUMNS}"
            )
        if self.spill_bytes and not target.may_spill:
            found.append(f"{self.spill_bytes} bytes spilled per thread")
        return found


def compile_variant(variant: KernelVariant, target: Target) -> Resources:
    """Compile for the target, from Triton's cache where it can, and read what was made.

    Pointers count as divisible by 16 bytes, as those of tensors are, and so do integers whose type
    in the signature ends in ``:16``. Triton finds out both at run time, and both change what a
    kernel is compiled to. ValueError if the variant leaves out an argument or names an unknown one.
    """
    source = _source(variant)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    kernel = triton.compile(source, target=target.gpu, options=options)
    shared = int(kernel.metadata.shared)
    if target.gpu.backend == "hip":
        return _of_code_object(kernel.asm["amdgcn"], shared)
    return _of_cubin(kernel.asm["cubin"], shared, int(kernel.metadata.tmem_size))


def _source(variant: KernelVariant) -> Any:
    names = variant.kernel.arg_names
    given = [*variant.signature, *variant.constants]
    if sorted(given) != sorted(names):
        wrong = sorted(set(given) ^ set(names)) or "an argument given twice"
        raise ValueError(f"signature and constants do not fit the arguments: {wrong}")
    signature, attributes = {}, {}
    for i, name in enumerate(names):
        kind, _, multiple = variant.signature.get(name, "constexpr").partition(":")
        if multiple not in ("", "16"):
            raise ValueError(f"{name}: divisible by 16 or not at all, not {multiple}")
        signature[name] = kind
        if multiple or kind.startswith("*"):
            attributes[(i,)] = _DIVISIBLE
    return ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs=dict(variant.constants),
        attrs=attributes,
    )


def _of_cubin(cubin: bytes, shared_bytes: int, tensor_columns: int) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = _numbers(r"(REG|STACK|LOCAL):(\d+)", text)
    return Resources(found["REG"], shared_bytes, found["STACK"] + found["LOCAL"], tensor_columns)


def _of_code_object(assembly: str, shared_bytes: int) -> Resources:
    found = _numbers(r"\.(\w+_count|group_segment_fixed_size):\s+(\d+)", assembly)
    return Resources(
        registers=found["vgpr_count"],
        shared_bytes=shared_bytes + found["group_segment_fixed_size"],
        spill_bytes=4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"]),
    )


def _numbers(pattern: str, text: str) -> dict[str, int]:
    return {name: int(number) for name, number in re.findall(pattern, text)}
