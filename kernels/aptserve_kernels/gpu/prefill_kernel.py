"""The kernel of :mod:`aptserve_kernels.gpu.prefill`, which says what it is for."""

# ruff: noqa: N803  (constants of a kernel are in capitals)

from __future__ import annotations

import triton
import triton.language as tl

from aptserve_kernels.gpu.tiles import (
    LAYOUT_INTS,
    LOWEST,
    STRIDE_MULTIPLE,
    final_scores,
    load_scales,
    load_vectors,
    unit_numbers,
)

KEY_STRIDES = ("k_row_stride", "k_head_stride", "v_row_stride", "v_head_stride")
PREFILL_INTS = ("window", "group", "q_row_stride", "q_head_stride", *KEY_STRIDES, *LAYOUT_INTS)
"""Whole numbers that change from call to call and must not lead to another compilation."""


@triton.jit
def _tile_ranges(earliest, latest, length, window, KEYS: tl.constexpr):
    """Tiles of keys for rows at the positions [earliest, latest].

    begin ≤ full_begin ≤ full_end ≤ end: some row sees something of the tiles in [begin, end), all
    rows see all of those in [full_begin, full_end).
    """
    begin = tl.maximum(earliest - window + 1, 0) // KEYS
    end = tl.cdiv(tl.maximum(tl.minimum(latest + 1, length), 0), KEYS)
    begin = tl.minimum(begin, end)
    full_begin = tl.minimum(tl.cdiv(tl.maximum(latest - window + 1, 0), KEYS), end)
    full_end = tl.maximum(tl.maximum(earliest + 1, 0) // KEYS, full_begin)
    return begin, full_begin, full_end, end


@triton.jit(do_not_specialize=PREFILL_INTS)
def prefill_kernel(
    out,
    q,
    keys,
    values,
    scales,
    tables,
    query_starts,
    key_starts,
    lengths,
    score_scale,
    score_cap,
    window,
    group,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    table_stride,
    units_per_block,
    heads_per_unit,
    block_shift,
    rows_per_unit,
    head_dim,
    PAGED: tl.constexpr,
    QUANTISED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``ROWS`` of (query, query head of the group) of one sequence, against one KV head."""
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    first_query = tl.load(query_starts + sequence)
    num_queries = (tl.load(query_starts + sequence + 1) - first_query).to(tl.int32)
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    if first_row >= num_queries * group:
        return
    length = tl.load(lengths + sequence).to(tl.int32)
    rows = first_row + tl.arange(0, ROWS)
    is_row = rows < num_queries * group
    query = rows // group
    head = kv_head * group + rows % group
    q_offsets = (first_query + query) * q_row_stride + head.to(tl.int64) * q_head_stride
    q_offsets = tl.multiple_of(q_offsets, STRIDE_MULTIPLE)
    q_tile = load_vectors(q, q_offsets, is_row, head_dim, BLOCK_D)

    # [0 .......... cached .......... | earliest row .. latest row | .. length)
    cached = length - num_queries
    stands_at = cached + query
    latest = cached + tl.minimum((first_row + ROWS - 1) // group, num_queries - 1)
    begin, full_begin, full_end, end = _tile_ranges(
        cached + first_row // group, latest, length, window, KEYS
    )
    if PAGED:
        table = tables + sequence * table_stride
        column = kv_head // heads_per_unit
        head_row = kv_head % heads_per_unit << block_shift
        k_start, v_start = keys, values
    else:
        first_key = tl.load(key_starts + sequence)
        k_start = keys + tl.multiple_of(kv_head.to(tl.int64) * k_head_stride, STRIDE_MULTIPLE)
        v_start = values + tl.multiple_of(kv_head.to(tl.int64) * v_head_stride, STRIDE_MULTIPLE)
    best = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for tile in tl.range(begin, end, num_stages=STAGES):
        positions = tile * KEYS + tl.arange(0, KEYS)
        seen = positions < length
        if PAGED:
            row = head_row + (positions & (1 << block_shift) - 1)
            unit = unit_numbers(table, positions, seen, column, units_per_block, block_shift)
            offsets = (unit * rows_per_unit + row) * head_dim
        else:
            offsets = tl.multiple_of((first_key + positions) * k_row_stride, STRIDE_MULTIPLE)
        k = load_vectors(k_start, offsets, seen, head_dim, BLOCK_D)
        products = tl.dot(q_tile, tl.trans(k.to(q_tile.dtype)), input_precision=PRECISION)
        if QUANTISED:
            k_scale = load_scales(scales, unit, row, seen, heads_per_unit, block_shift)
            products *= k_scale[None, :]
        scores = final_scores(products, score_scale, score_cap)
        if (tile < full_begin) | (tile >= full_end):
            behind = stands_at[:, None] - positions[None, :]
            scores = tl.where((behind >= 0) & (behind < window), scores, float("-inf"))
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
        if QUANTISED:
            offsets = (unit * rows_per_unit + row) * head_dim
        elif PAGED:
            column_v = column + units_per_block // 2
            unit = unit_numbers(table, positions, seen, column_v, units_per_block, block_shift)
            offsets = (unit * rows_per_unit + row) * head_dim
        else:
            offsets = tl.multiple_of((first_key + positions) * v_row_stride, STRIDE_MULTIPLE)
        v = load_vectors(v_start, offsets, seen, head_dim, BLOCK_D).to(q_tile.dtype)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)

    total = tl.where(total > 0.0, total, 1.0)  # what saw nothing ends as zeros
    result = acc / total[:, None]
    dims = tl.arange(0, BLOCK_D)
    at = ((first_query + query) * tl.num_programs(1) * group + head) * head_dim
    stored = is_row[:, None] & (dims < head_dim)[None, :]
    tl.store(out + at[:, None] + dims[None, :], result, mask=stored)
