"""Logits adjusted before a token is drawn, and tokens counted after it.

Penalties are bound by the bytes of logits (read and written) and counts (read), and only rows that
have any are touched. Bias entries are few: one thread for each.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from aptserve_kernels.gpu.variants import KernelVariant
from aptserve_kernels.sampling import COUNT_DTYPE, MAX_COUNT, Penalties, SamplingBatch, TokenBias

_TILE = 2048
_ENTRIES = 128
_SATURATED = tl.constexpr(2 * MAX_COUNT)


@triton.jit
def _penalise_kernel(
    logits,
    repetition,
    presence,
    frequency,
    counts,
    rows,
    vocab_size,
    row_stride,
    tile: tl.constexpr,
):
    """Program (tile of tokens, row)."""
    row = tl.program_id(1).to(tl.int64)
    divisor = tl.load(repetition + row)
    once = tl.load(presence + row)
    each = tl.load(frequency + row)
    count_row = tl.load(rows + row)
    if (count_row >= 0) & ((divisor != 1.0) | (once != 0.0) | (each != 0.0)):
        tokens = tl.program_id(0) * tile + tl.arange(0, tile)
        mask = tokens < vocab_size
        places = logits + row * row_stride + tokens
        x = tl.load(places, mask=mask, other=0.0)
        seen = tl.load(counts + count_row * vocab_size + tokens, mask=mask, other=0)
        times = (seen >> 1).to(tl.float32)
        milder = tl.where(x > 0.0, tl.div_rn(x, divisor), x * divisor)
        penalised = tl.where(seen > 0, milder, x)
        penalised = tl.where(times > 0.0, penalised - (once + each * times), penalised)
        tl.store(places, penalised, mask=mask)


@triton.jit(do_not_specialize=["num_entries"])
def _add_bias_kernel(logits, rows, token_ids, values, num_entries, row_stride, tile: tl.constexpr):
    entries = tl.program_id(0) * tile + tl.arange(0, tile)
    exists = entries < num_entries
    row = tl.load(rows + entries, mask=exists, other=-1)
    exists = row >= 0
    token = tl.load(token_ids + entries, mask=exists, other=0)
    value = tl.load(values + entries, mask=exists, other=0.0)
    places = logits + row * row_stride + token
    tl.store(places, tl.load(places, mask=exists, other=0.0) + value, mask=exists)


@triton.jit(do_not_specialize=["num_rows"])
def _count_tokens_kernel(counts, rows, token_ids, num_rows, vocab_size, tile: tl.constexpr):
    entries = tl.program_id(0) * tile + tl.arange(0, tile)
    row = tl.load(rows + entries, mask=entries < num_rows, other=-1)
    exists = row >= 0
    token = tl.load(token_ids + entries, mask=exists, other=0)
    places = counts + row * vocab_size + token
    before = tl.load(places, mask=exists, other=0)
    tl.store(places, tl.where(before >= _SATURATED, before, before + 2), mask=exists)


def adjust(logits: Tensor, batch: SamplingBatch) -> None:
    """As :func:`aptserve_kernels.sampling.adjust`; rows of ``logits`` may lie apart."""
    check_logits(logits)
    if logits.shape[0] == 0:
        return
    if batch.penalties is not None:
        _penalise(logits, batch.penalties)
    if batch.bias is not None:
        _add_bias(logits, batch.bias)


def count_tokens(counts: Tensor, rows: Tensor, token_ids: Tensor) -> None:
    """As :func:`aptserve_kernels.sampling.count_tokens`."""
    _check_counts(counts)
    check_vector("rows", rows, torch.int64)
    check_vector("token_ids", token_ids, torch.int64, rows.shape[0])
    if rows.shape[0]:
        _count_tokens_kernel[(triton.cdiv(rows.shape[0], _ENTRIES),)](
            counts=counts,
            rows=rows,
            token_ids=token_ids,
            num_rows=rows.shape[0],
            vocab_size=counts.shape[1],
            tile=_ENTRIES,
            num_warps=4,
        )


def _penalise(logits: Tensor, p: Penalties) -> None:
    batch, vocab_size = logits.shape
    _check_counts(p.counts)
    if p.counts.shape[1] != vocab_size:
        raise ValueError(f"counts: {p.counts.shape[1]} tokens wide, logits {vocab_size}")
    for name in ("repetition", "presence", "frequency"):
        check_vector(name, getattr(p, name), torch.float32, batch)
    check_vector("rows", p.rows, torch.int64, batch)
    _penalise_kernel[(triton.cdiv(vocab_size, _TILE), batch)](
        logits=logits,
        repetition=p.repetition,
        presence=p.presence,
        frequency=p.frequency,
        counts=p.counts,
        rows=p.rows,
        vocab_size=vocab_size,
        row_stride=logits.stride(0),
        tile=_TILE,
        num_warps=4,
    )


def _add_bias(logits: Tensor, b: TokenBias) -> None:
    num_entries = b.rows.shape[0]
    check_vector("rows", b.rows, torch.int64)
    check_vector("token_ids", b.token_ids, torch.int64, num_entries)
    check_vector("values", b.values, torch.float32, num_entries)
    if num_entries:
        _add_bias_kernel[(triton.cdiv(num_entries, _ENTRIES),)](
            logits=logits,
            rows=b.rows,
            token_ids=b.token_ids,
            values=b.values,
            num_entries=num_entries,
            row_stride=logits.stride(0),
            tile=_ENTRIES,
            num_warps=4,
        )


def check_logits(logits: Tensor) -> None:
    """ValueError unless logits are float32 rows, each in one piece."""
    if logits.dtype != torch.float32 or logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError("logits: not float32 [batch, vocab_size] with rows in one piece")


def check_vector(name: str, tensor: Tensor, dtype: torch.dtype, size: int | None = None) -> None:
    """ValueError unless ``tensor`` is a vector of ``dtype``, in one piece, of that size."""
    if tensor.dtype != dtype or tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(f"{name}: not a vector of {dtype} in one piece")
    if size is not None and tensor.shape[0] != size:
        raise ValueError(f"{name}: {tensor.shape[0]} entries, not {size}")


def _check_counts(counts: Tensor) -> None:
    if counts.dtype != COUNT_DTYPE or counts.dim() != 2 or not counts.is_contiguous():
        raise ValueError(f"counts: not {COUNT_DTYPE} [max_sequences, vocab_size] in one piece")


def variants() -> Iterator[KernelVariant]:
    """One each."""
    yield KernelVariant(
        name="penalties",
        kernel=_penalise_kernel,
        signature={
            **dict.fromkeys(("logits", "repetition", "presence", "frequency"), "*fp32"),
            "counts": "*i16",
            "rows": "*i64",
            **dict.fromkeys(("vocab_size", "row_stride"), "i32:16"),
        },
        constants={"tile": _TILE},
        num_warps=4,
    )
    yield KernelVariant(
        name="bias",
        kernel=_add_bias_kernel,
        signature={
            **dict.fromkeys(("logits", "values"), "*fp32"),
            **dict.fromkeys(("rows", "token_ids"), "*i64"),
            "num_entries": "i32",
            "row_stride": "i32:16",
        },
        constants={"tile": _ENTRIES},
        num_warps=4,
    )
    yield KernelVariant(
        name="counts",
        kernel=_count_tokens_kernel,
        signature={
            "counts": "*i16",
            **dict.fromkeys(("rows", "token_ids"), "*i64"),
            "num_rows": "i32",
            "vocab_size": "i32:16",
        },
        constants={"tile": _ENTRIES},
        num_warps=4,
    )
