"""Causal attention of many query rows per sequence, over paged or contiguous keys and values.

``out_i = Σ_j softmax_j(scaling · q_i·k_j) v_j`` over the positions j that row i sees (after
FlashAttention 2, Dao, arXiv 2307.08691). Bound by arithmetic: a tile of keys is read once for
``ROWS`` rows, mostly from the L2 cache, which is ``ROWS`` operations per byte in 16 bits.

- The rows of a tile are queries times the query heads of one KV head, so that grouped queries share
  what is read and a short chunk still fills a tile.
- Tiles of keys that no row of the tile sees are skipped, and scores are masked only in tiles that
  some rows see in part: at the diagonal and at the far end of a window.
- Late tiles of rows see most and are started first, so that short ones fill the end of the run.

A program takes all the context of its rows: a chunk of a few rows over a long context keeps only
``num_kv_heads`` programs per sequence busy. Codes are converted as they are multiplied, which
before sm_90 each warp does for a whole tile and takes longer than the products: a prompt without
cached context has its keys at hand and belongs in ``attend_ragged``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aptserve_kernels.batch import AttentionParams, PrefillBatch
from aptserve_kernels.gpu.prefill_kernel import KEY_STRIDES, PREFILL_INTS, prefill_kernel
from aptserve_kernels.gpu.tiles import (
    CODES,
    COMPILED_HEAD_DIMS,
    LAYOUT_INTS,
    Codes,
    block_of,
    check_queries,
    check_vectors,
    code_dtypes,
    dot_precision,
    layout_arguments,
    score_arguments,
    target_of,
)
from aptserve_kernels.gpu.variants import DTYPES, TARGETS, KernelVariant


def prefill_kv(q: Tensor, pool: Tensor, batch: PrefillBatch, params: AttentionParams) -> Tensor:
    """As :func:`aptserve_kernels.reference.prefill_kv`.

    ``q`` may have any strides that are multiples of 8 elements. Rows that belong to no sequence are
    left as they are in fresh memory: give padding to a sequence of length 0.
    """
    return _paged(q, pool, batch, params, None)


def prefill_kv8(
    q: Tensor,
    pool: Tensor,
    scales: Tensor,
    batch: PrefillBatch,
    params: AttentionParams,
    code_dtype: torch.dtype,
) -> Tensor:
    """As :func:`aptserve_kernels.reference.prefill_kv8`; e4m3 needs a GPU that has it."""
    return _paged(q, pool, batch, params, Codes(scales, code_dtype))


def attend_ragged(
    q: Tensor, k: Tensor, v: Tensor, batch: PrefillBatch, params: AttentionParams
) -> Tensor:
    """As :func:`aptserve_kernels.reference.attend_ragged`.

    ``q``, ``k`` and ``v`` may have any strides that are multiples of 8 elements.
    """
    head_dim = q.shape[-1]
    check_vectors("q", q, None, head_dim)
    check_vectors("k", k, None, head_dim)
    check_vectors("v", v, k.shape[1], head_dim)
    if not q.dtype is k.dtype is v.dtype:
        raise ValueError("k, v: the dtype of q")
    if q.shape[1] % k.shape[1]:
        raise ValueError("q: a whole number of heads for each KV head")
    if batch.key_starts is None:
        raise ValueError("key_starts: needed for keys without blocks")
    _check_ints("key_starts", batch.key_starts, batch.lengths.shape[0] + 1)
    config = _config(q.dtype, head_dim, False, False, target_of(q.device))
    arguments = {
        "keys": k,
        "values": v,
        "scales": None,
        "tables": None,
        "key_starts": batch.key_starts,
        "k_row_stride": k.stride(0),
        "k_head_stride": k.stride(1),
        "v_row_stride": v.stride(0),
        "v_head_stride": v.stride(1),
        **dict.fromkeys(LAYOUT_INTS, 0),
    }
    return _launch(q, k.shape[1], batch, params, config, arguments)


def _paged(
    q: Tensor, pool: Tensor, batch: PrefillBatch, params: AttentionParams, codes: Codes | None
) -> Tensor:
    check_queries(q, pool, batch.geometry)
    layout = layout_arguments(pool, batch.tables, batch.geometry, codes)
    if batch.tables.shape[0] != batch.lengths.shape[0]:
        raise ValueError("tables: one for each sequence")
    source = layout.pop("pool")
    arguments = {
        "keys": source,
        "values": source,
        "key_starts": None,
        **dict.fromkeys(KEY_STRIDES, 0),
        **layout,
    }
    config = _config(q.dtype, q.shape[2], True, codes is not None, target_of(q.device))
    return _launch(q, batch.geometry.num_kv_heads, batch, params, config, arguments)


def _launch(
    q: Tensor,
    num_kv_heads: int,
    batch: PrefillBatch,
    params: AttentionParams,
    config: _Config,
    arguments: dict[str, Any],
) -> Tensor:
    sequences = batch.lengths.shape[0]
    _check_ints("lengths", batch.lengths, sequences)
    _check_ints("query_starts", batch.query_starts, sequences + 1)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    group = q.shape[1] // num_kv_heads
    tiles = -(-batch.max_queries * group // config.constants["ROWS"])
    if tiles == 0 or sequences == 0:
        return out
    prefill_kernel[(tiles, num_kv_heads, sequences)](
        out=out,
        q=q,
        query_starts=batch.query_starts,
        lengths=batch.lengths,
        group=group,
        q_row_stride=q.stride(0),
        q_head_stride=q.stride(1),
        head_dim=q.shape[2],
        **arguments,
        **score_arguments(params),
        **config.constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def _check_ints(name: str, x: Tensor, size: int) -> None:
    if x.dtype is not torch.int64 or x.shape != (size,) or not x.is_contiguous():
        raise ValueError(f"{name}: [{size}] contiguous int64")


@dataclass(frozen=True, slots=True)
class _Config:
    """How a case is launched."""

    constants: dict[str, Any]
    num_warps: int
    num_stages: int


def _config(
    dtype: torch.dtype, head_dim: int, paged: bool, quantised: bool, target: str
) -> _Config:
    """Sixteen rows to a warp, and the widest tile of keys without spills.

    Before sm_90 a warp takes all keys of a tile, as they are multiplied, from registers. A load of
    paged vectors waits for one of unit numbers, so that five stages go as far ahead as three.
    """
    block_d, num_warps = block_of(head_dim), 8
    is_wide = target in ("sm_90", "sm_100")
    if dtype is torch.float32:
        rows, keys, num_warps = (32, 32, 4) if block_d <= 128 else (16, 16, 4)
    elif block_d > 128:
        rows, keys = 64, 16 if quantised and not is_wide else 32
    elif quantised:
        rows, keys = 128 if is_wide or block_d <= 64 else 64, 32
    else:
        rows, keys = 128, 64 if is_wide or block_d <= 64 else 32
    stages = 5 if paged else 3
    if target == "gfx942":  # 64 KiB of local memory
        stages = 3 if paged else 2
    constants = {
        "PAGED": paged,
        "QUANTISED": quantised,
        "BLOCK_D": block_d,
        "ROWS": rows,
        "KEYS": keys,
        "PRECISION": dot_precision(dtype),
        "STAGES": stages,
    }
    return _Config(constants, num_warps, stages)


def variants() -> Iterator[KernelVariant]:
    """Every shipped configuration. Block sizes and groups compile to the same."""
    for target in TARGETS:
        for dtype, name in DTYPES.items():
            for head_dim in COMPILED_HEAD_DIMS:
                suffix = f"{name} d{head_dim}"
                yield _variant(f"attend_ragged {suffix}", target, dtype, head_dim, False, None)
                yield _variant(f"prefill_kv {suffix}", target, dtype, head_dim, True, None)
                for code_dtype in code_dtypes(dtype, target):
                    full_name = f"prefill_kv8 {suffix} {CODES[code_dtype]}"
                    yield _variant(full_name, target, dtype, head_dim, True, code_dtype)


def _variant(
    name: str,
    target: str,
    dtype: torch.dtype,
    head_dim: int,
    paged: bool,
    code_dtype: torch.dtype | None,
) -> KernelVariant:
    config = _config(dtype, head_dim, paged, code_dtype is not None, target)
    element = DTYPES[dtype]
    cached = element if code_dtype is None else CODES[code_dtype]
    signature = {
        "out": f"*{element}",
        "q": f"*{element}",
        "keys": f"*{cached}",
        "values": f"*{cached}",
        "query_starts": "*i64",
        "lengths": "*i64",
        "score_scale": "fp32",
        "score_cap": "fp32",
        "head_dim": "i32:16",
    } | dict.fromkeys(PREFILL_INTS, "i32")
    constants = dict(config.constants)
    for pointer, kind, is_given in (
        ("scales", "*fp16", code_dtype is not None),
        ("tables", "*i64", paged),
        ("key_starts", "*i64", not paged),
    ):
        if is_given:
            signature[pointer] = kind
        else:
            constants[pointer] = None
    return KernelVariant(
        name, prefill_kernel, signature, constants, config.num_warps, config.num_stages, (target,)
    )
