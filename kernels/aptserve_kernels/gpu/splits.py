"""A context in parts, one program for each, and the kernel that joins their results.

Few sequences are too few programs, so a context is split (flash decoding). The number of parts is
known to the host without the lengths; how much one takes is worked out from a sequence's own
length. Fixed sizes would follow from the capacity of the tables, of which a short context would
fill one part only. A part never takes under ``MIN_SPLIT`` tokens; those left over are empty.
"""

# ruff: noqa: N803  (constants of a kernel are in capitals)

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from aptserve_kernels.gpu.variants import DTYPES, KernelVariant

MIN_SPLIT = 64
_MAX_SPLITS = 64
_WANTED_PROGRAMS = 1024
"""About eight for each multiprocessor of the largest GPUs: two waves of what they hold."""

_CONSTANTS = {"BLOCK_D": 128, "MAX_SPLITS": _MAX_SPLITS, "TILE": 16}
_NUM_WARPS = 4
"""What joins parts is launched in one way: 16 parts of 128 elements are 16 floats per thread."""


def num_splits(num_programs: int, capacity: int, window: int | None) -> int:
    """Parts of each context, where ``num_programs`` are needed without any.

    ``capacity``: tokens of the longest context that there can be.
    """
    visible = capacity if window is None else min(capacity, window)
    wanted = -(-_WANTED_PROGRAMS // num_programs)
    return max(1, min(_MAX_SPLITS, wanted, -(-visible // MIN_SPLIT)))


@triton.jit
def split_bounds(lengths, sequence, window, KEYS: tl.constexpr, MIN_SPLIT: tl.constexpr):
    """The positions [first, stop) of this program; none where first >= stop."""
    length = tl.load(lengths + sequence).to(tl.int32)
    begin = tl.maximum(length - window, 0)
    size = tl.cdiv(tl.cdiv(length - begin, tl.num_programs(0)), KEYS) * KEYS
    size = tl.maximum(size, MIN_SPLIT)
    first = begin + tl.program_id(0) * size
    return first, tl.minimum(first + size, length)


@triton.jit(do_not_specialize=["num_splits", "head_dim"])
def _combine(
    out,
    partial,
    lse,
    num_splits,
    head_dim,
    BLOCK_D: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """``Σ_s w_s partial_s`` of a query head, ``w = softmax(lse)``; zeros if all parts are empty."""
    head = tl.program_id(0).to(tl.int64)
    all_splits = tl.arange(0, MAX_SPLITS)
    is_split = all_splits < num_splits
    sums = tl.load(lse + head * num_splits + all_splits, mask=is_split, other=float("-inf"))
    best = tl.max(sums, 0)
    total = tl.sum(tl.exp2(sums - best), 0)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_dim = dims < head_dim
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(0, num_splits, TILE):
        splits = start + tl.arange(0, TILE)
        is_part = splits < num_splits
        at = head * num_splits + splits
        weights = tl.exp2(tl.load(lse + at, mask=is_part, other=float("-inf")) - best)
        places = partial + at[:, None] * head_dim + dims[None, :]
        parts = tl.load(places, mask=is_part[:, None] & is_dim[None, :], other=0.0)
        acc += tl.sum(weights[:, None] * parts, 0)
    tl.store(out + head * head_dim + dims, acc / total, mask=is_dim)


def combine(out: Tensor, partial: Tensor, lse: Tensor) -> None:
    """Write ``out``, contiguous ``[..., head_dim]``, from the results of parts.

    ``partial``: ``[rows, splits, head_dim]`` float32, each part's own output; ``lse``: ``[rows,
    splits]``, log2 of the sum of exp2 of its scores. An empty part is zeros and ``LOWEST``.
    """
    rows, splits, head_dim = partial.shape
    _combine[(rows, -(-head_dim // _CONSTANTS["BLOCK_D"]))](
        out=out,
        partial=partial,
        lse=lse,
        num_splits=splits,
        head_dim=head_dim,
        **_CONSTANTS,
        num_warps=_NUM_WARPS,
    )


def variants() -> Iterator[KernelVariant]:
    """Every shipped configuration."""
    for dtype in DTYPES.values():
        yield KernelVariant(
            name=f"combine {dtype}",
            kernel=_combine,
            signature={
                "out": f"*{dtype}",
                "partial": "*fp32",
                "lse": "*fp32",
                "num_splits": "i32",
                "head_dim": "i32",
            },
            constants=_CONSTANTS,
            num_warps=_NUM_WARPS,
        )
