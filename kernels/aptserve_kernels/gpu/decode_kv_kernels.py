"""The kernels of :mod:`aptserve_kernels.gpu.decode_kv`, which says what they are for."""

# ruff: noqa: N803  (constants of a kernel are in capitals)

from __future__ import annotations

import triton
import triton.language as tl

from aptserve_kernels.gpu.splits import split_bounds
from aptserve_kernels.gpu.tiles import (
    LAYOUT_INTS,
    LOWEST,
    STRIDE_MULTIPLE,
    final_scores,
    load_scales,
    load_vectors,
    unit_numbers,
)

DECODE_INTS = ("window", "group", "q_row_stride", "q_head_stride", *LAYOUT_INTS)
"""Whole numbers that change from call to call and must not lead to another compilation."""


@triton.jit(do_not_specialize=DECODE_INTS)
def decode_group(
    out,
    partial,
    lse,
    q,
    pool,
    scales,
    tables,
    lengths,
    score_scale,
    score_cap,
    window,
    group,
    q_row_stride,
    q_head_stride,
    table_stride,
    units_per_block,
    heads_per_unit,
    block_shift,
    rows_per_unit,
    head_dim,
    QUANTISED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Up to ``ROWS`` query heads of one KV head over one part of one sequence's context."""
    sequence = tl.program_id(2).to(tl.int64)
    tiles = tl.cdiv(group, ROWS)
    kv_head = tl.program_id(1) // tiles
    kv_heads = tl.num_programs(1) // tiles
    in_group = tl.program_id(1) % tiles * ROWS + tl.arange(0, ROWS)
    head = kv_head * group + in_group
    is_head = in_group < group
    q_start = q + tl.multiple_of(sequence * q_row_stride, STRIDE_MULTIPLE)
    q_offsets = tl.multiple_of(head.to(tl.int64) * q_head_stride, STRIDE_MULTIPLE)
    q_tile = load_vectors(q_start, q_offsets, is_head, head_dim, BLOCK_D)

    first, stop = split_bounds(lengths, sequence, window, KEYS, MIN_SPLIT)
    table = tables + sequence * table_stride
    column = kv_head // heads_per_unit
    head_row = kv_head % heads_per_unit << block_shift
    best = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in tl.range(first, stop, KEYS, num_stages=STAGES):
        positions = start + tl.arange(0, KEYS)
        seen = positions < stop
        row = head_row + (positions & (1 << block_shift) - 1)
        unit = unit_numbers(table, positions, seen, column, units_per_block, block_shift)
        k = load_vectors(pool, (unit * rows_per_unit + row) * head_dim, seen, head_dim, BLOCK_D)
        products = tl.dot(q_tile, tl.trans(k.to(q_tile.dtype)), input_precision=PRECISION)
        if QUANTISED:
            products *= load_scales(scales, unit, row, seen, heads_per_unit, block_shift)[None, :]
        scores = final_scores(products, score_scale, score_cap)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        if QUANTISED:
            row += heads_per_unit << block_shift
            v_scale = load_scales(scales, unit, row, seen, heads_per_unit, block_shift)
            scores += tl.log2(v_scale)[None, :]
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        total *= shrink
        if QUANTISED:
            total += tl.sum(weights / v_scale[None, :], 1)
        else:
            total += tl.sum(weights, 1)
        best = new_best
        if not QUANTISED:
            column_v = column + units_per_block // 2
            unit = unit_numbers(table, positions, seen, column_v, units_per_block, block_shift)
        v = load_vectors(pool, (unit * rows_per_unit + row) * head_dim, seen, head_dim, BLOCK_D)
        v = v.to(q_tile.dtype)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)

    total = tl.where(total > 0.0, total, 1.0)  # what saw nothing ends as zeros
    result = acc / total[:, None]
    dims = tl.arange(0, BLOCK_D)
    stored = is_head[:, None] & (dims < head_dim)[None, :]
    at = sequence * kv_heads * group + head
    if tl.num_programs(0) == 1:
        tl.store(out + at[:, None] * head_dim + dims[None, :], result, mask=stored)
    else:
        at = at * tl.num_programs(0) + tl.program_id(0)
        tl.store(partial + at[:, None] * head_dim + dims[None, :], result, mask=stored)
        tl.store(lse + at, best + tl.log2(total), mask=is_head)


@triton.jit(do_not_specialize=DECODE_INTS)
def decode_single(
    out,
    partial,
    lse,
    q,
    pool,
    scales,
    tables,
    lengths,
    score_scale,
    score_cap,
    window,
    group,
    q_row_stride,
    q_head_stride,
    table_stride,
    units_per_block,
    heads_per_unit,
    block_shift,
    rows_per_unit,
    head_dim,
    BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One query head over one part of one sequence's context, a softmax for each place of a tile.

    ``best`` and ``total`` are ``[KEYS]``, ``acc`` is ``[KEYS, BLOCK_D]``: place i has seen the
    positions i, i + KEYS, i + 2 KEYS and so on. ``scales`` is None and ``group`` is 1.
    """
    sequence = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    is_dim = dims < head_dim
    q_offset = sequence * q_row_stride + head.to(tl.int64) * q_head_stride
    q_start = q + tl.multiple_of(q_offset, STRIDE_MULTIPLE)
    query = tl.load(q_start + dims, mask=is_dim, other=0.0).to(tl.float32)

    first, stop = split_bounds(lengths, sequence, window, KEYS, MIN_SPLIT)
    table = tables + sequence * table_stride
    column = head // heads_per_unit
    head_row = head % heads_per_unit << block_shift
    best = tl.full([KEYS], LOWEST, tl.float32)
    total = tl.zeros([KEYS], tl.float32)
    acc = tl.zeros([KEYS, BLOCK_D], tl.float32)
    for start in tl.range(first, stop, KEYS, num_stages=STAGES):
        positions = start + tl.arange(0, KEYS)
        seen = positions < stop
        row = head_row + (positions & (1 << block_shift) - 1)
        unit = unit_numbers(table, positions, seen, column, units_per_block, block_shift)
        k = load_vectors(pool, (unit * rows_per_unit + row) * head_dim, seen, head_dim, BLOCK_D)
        products = tl.sum(query[None, :] * k.to(tl.float32), 1)
        scores = final_scores(products, score_scale, score_cap)
        scores = tl.where(seen, scores, float("-inf"))
        new_best = tl.maximum(best, scores)
        weights = tl.exp2(scores - new_best)
        shrink = tl.exp2(best - new_best)
        total = total * shrink + weights
        best = new_best
        column_v = column + units_per_block // 2
        unit = unit_numbers(table, positions, seen, column_v, units_per_block, block_shift)
        v = load_vectors(pool, (unit * rows_per_unit + row) * head_dim, seen, head_dim, BLOCK_D)
        acc = acc * shrink[:, None] + weights[:, None] * v.to(tl.float32)

    best_of_all = tl.max(best, 0)
    shrink = tl.exp2(best - best_of_all)
    total_of_all = tl.sum(total * shrink, 0)
    total_of_all = tl.where(total_of_all > 0.0, total_of_all, 1.0)
    result = tl.sum(acc * shrink[:, None], 0) / total_of_all
    at = sequence * tl.num_programs(1) + head
    if tl.num_programs(0) == 1:
        tl.store(out + at * head_dim + dims, result, mask=is_dim)
    else:
        at = at * tl.num_programs(0) + tl.program_id(0)
        tl.store(partial + at * head_dim + dims, result, mask=is_dim)
        tl.store(lse + at, best_of_all + tl.log2(total_of_all))
