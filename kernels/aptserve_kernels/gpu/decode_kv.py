"""Attention of one query row per sequence over paged keys and values, plain or as 8-bit codes.

``out = Σ_j softmax_j(scaling · q·k_j) v_j`` over the tokens that the row sees. Bound by memory: a
token and KV head cost ``2 · head_dim`` elements read and four operations on each per query head, so
the design is about reading each element once, 16 bytes at a time, with enough loads under way:

- A program takes one KV head of one sequence and all its query heads, so that grouped queries share
  what is read. The layout of a unit makes a head's tokens of a block one run of memory.
- The context is split so that few sequences fill a GPU too, see ``splits``. A part costs 8 bytes
  per element of a query head, written and read again; its tokens are 256 or more of a KV head.
- Query heads of a group are the rows of a matrix product, padded to 16. A single one would waste it
  and needs no tensor cores: there each of the tile's places keeps a softmax of its own, and the
  loop has no reduction over tokens and no barrier for one; they are joined at the end.

Codes: the scale of a key multiplies its column of scores, exactly as if it had multiplied the key.
That of a value joins the exponent of its weight, ``exp2(s + log2 scale - maximum)``, and is divided
out of the sum of weights. A product of weight and scale would fall below the smallest normal number
of float16, and multiplying the values would be ``head_dim`` operations per token, not one per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aptserve_kernels.batch import AttentionParams, DecodeBatch
from aptserve_kernels.gpu import splits
from aptserve_kernels.gpu.decode_kv_kernels import DECODE_INTS, decode_group, decode_single
from aptserve_kernels.gpu.splits import MIN_SPLIT
from aptserve_kernels.gpu.tiles import (
    CODES,
    COMPILED_HEAD_DIMS,
    FP8_TARGETS,
    Codes,
    block_of,
    check_queries,
    code_dtypes,
    dot_precision,
    layout_arguments,
    score_arguments,
)
from aptserve_kernels.gpu.variants import DTYPES, TARGETS, KernelVariant


def decode_kv(q: Tensor, pool: Tensor, batch: DecodeBatch, params: AttentionParams) -> Tensor:
    """As :func:`aptserve_kernels.reference.decode_kv`.

    ``q`` may have any strides that are multiples of 8 elements. A length of 0 gives zeros.
    """
    return _decode(q, pool, batch, params, None)


def decode_kv8(
    q: Tensor,
    pool: Tensor,
    scales: Tensor,
    batch: DecodeBatch,
    params: AttentionParams,
    code_dtype: torch.dtype,
) -> Tensor:
    """As :func:`aptserve_kernels.reference.decode_kv8`; e4m3 needs a GPU that has it."""
    return _decode(q, pool, batch, params, Codes(scales, code_dtype))


def _decode(
    q: Tensor, pool: Tensor, batch: DecodeBatch, params: AttentionParams, codes: Codes | None
) -> Tensor:
    group = check_queries(q, pool, batch.geometry)
    layout = layout_arguments(pool, batch.tables, batch.geometry, codes)
    sequences, heads, head_dim = q.shape
    if batch.lengths.dtype is not torch.int64 or batch.lengths.shape != (sequences,):
        raise ValueError("lengths: int64, one for each row of q")
    if batch.tables.shape[0] != sequences:
        raise ValueError("tables: one for each row of q")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if sequences == 0:
        return out
    config = _config(q.dtype, head_dim, group, codes is not None)
    row_programs = heads // group * -(-group // config.rows)
    capacity = batch.tables.shape[1] * batch.geometry.block_size
    parts = splits.num_splits(sequences * row_programs, capacity, params.window)
    rows = sequences * heads if parts > 1 else 0
    partial = torch.empty((rows, parts, head_dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((rows, parts), dtype=torch.float32, device=q.device)
    config.kernel[(parts, row_programs, sequences)](
        out=out,
        partial=partial,
        lse=lse,
        q=q,
        lengths=batch.lengths,
        group=group,
        q_row_stride=q.stride(0),
        q_head_stride=q.stride(1),
        head_dim=head_dim,
        **layout,
        **score_arguments(params),
        **config.constants,
        num_warps=config.num_warps,
        num_stages=config.stages,
    )
    if parts > 1:
        splits.combine(out, partial, lse)
    return out


@dataclass(frozen=True, slots=True)
class _Config:
    """How a case is launched. ``rows``: query heads that one program takes."""

    kernel: Any
    rows: int
    constants: dict[str, Any]
    num_warps: int
    stages: int


def _config(dtype: torch.dtype, head_dim: int, group: int, quantised: bool) -> _Config:
    """A tile of keys is 8 KiB, so that a multiprocessor has room for several programs."""
    block_d = block_of(head_dim)
    is_single = group == 1 and not quantised
    keys = max(16, (2048 if dtype is torch.float32 else 4096) // block_d)
    # Two tiles of keys and of values are on their way; of float32 in groups one, for want of room.
    stages = 3 if is_single or dtype is torch.float32 else 5
    constants: dict[str, Any] = {
        "BLOCK_D": block_d,
        "KEYS": keys,
        "MIN_SPLIT": MIN_SPLIT,
        "STAGES": stages,
    }
    if is_single:
        return _Config(decode_single, 1, constants, 4, stages)
    constants |= {"QUANTISED": quantised, "ROWS": 16, "PRECISION": dot_precision(dtype)}
    return _Config(decode_group, 16, constants, 4, stages)


def variants() -> Iterator[KernelVariant]:
    """Every shipped configuration. Block sizes and larger groups compile to the same."""
    for dtype, name in DTYPES.items():
        for head_dim in COMPILED_HEAD_DIMS:
            yield _variant(dtype, head_dim, 1, None, f"decode_kv {name} d{head_dim} single")
            yield _variant(dtype, head_dim, 8, None, f"decode_kv {name} d{head_dim} group")
            for code_dtype in code_dtypes(dtype, "sm_90"):
                full_name = f"decode_kv8 {name} d{head_dim} {CODES[code_dtype]}"
                yield _variant(dtype, head_dim, 8, code_dtype, full_name)
    yield from splits.variants()


def _variant(
    dtype: torch.dtype, head_dim: int, group: int, code_dtype: torch.dtype | None, name: str
) -> KernelVariant:
    config = _config(dtype, head_dim, group, code_dtype is not None)
    element = DTYPES[dtype]
    signature = {
        "out": f"*{element}",
        "partial": "*fp32",
        "lse": "*fp32",
        "q": f"*{element}",
        "pool": f"*{element if code_dtype is None else CODES[code_dtype]}",
        "tables": "*i64",
        "lengths": "*i64",
        "score_scale": "fp32",
        "score_cap": "fp32",
        "head_dim": "i32:16",
    } | dict.fromkeys(DECODE_INTS, "i32")
    constants = dict(config.constants)
    if code_dtype is None:
        constants["scales"] = None
    else:
        signature["scales"] = "*fp16"
    targets = FP8_TARGETS if code_dtype is torch.float8_e4m3fn else TARGETS
    return KernelVariant(
        name, config.kernel, signature, constants, config.num_warps, config.stages, targets
    )
