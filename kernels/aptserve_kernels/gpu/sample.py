"""One token per row, drawn in a single launch that never sorts and never asks the host.

A program owns a row and looks at it several times: once for the best token, which is all that
greedy rows need; once for the sum of weights; about 15 times where ``top_k`` or ``top_p`` ask for a
threshold; once or twice to draw. The row is read from memory once and then lives in the
second-level cache (512 KiB for 128k tokens), so what bounds a program is how fast one
multiprocessor reads from there, and rows do not wait for each other.

A threshold is found by bisection over the logits as whole numbers that order alike. Each look snaps
both ends of the bracket to logits that occur, so the search ends when one is left, and what lies
above it is known exactly: weights are whole numbers (:mod:`aptserve_kernels.sampling`), and their
sums are the same in any order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from aptserve_kernels.gpu import adjust as _adjust
from aptserve_kernels.gpu.adjust import adjust, check_logits, check_vector
from aptserve_kernels.gpu.variants import KernelVariant
from aptserve_kernels.sampling import WEIGHT_BITS, SamplingBatch

_TILE = 4096
_NUM_WARPS = 16

_ONE = tl.constexpr(2.0**WEIGHT_BITS)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LARGEST_KEY = tl.constexpr(2**31 - 1)
_SMALLEST_KEY = tl.constexpr(-(2**31))
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)


@triton.jit
def _load(row, start, vocab_size, tile: tl.constexpr):
    """Logits of a tile, -inf past the end: these have the lowest key and no weight."""
    tokens = start + tl.arange(0, tile)
    return tl.load(row + tokens, mask=tokens < vocab_size, other=float("-inf"))


@triton.jit
def _keys(x):
    """int32 that order as the logits do; -0 and 0 are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _weights(x, best, scale):
    return (tl.exp2((x - best) * scale) * _ONE + 0.5).to(tl.int64)


@triton.jit
def _mix(value):
    value += _GOLDEN
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@triton.jit
def _target(seed, position, total):
    """The random number times ``total``, rounded down: 53 bits of it in the upper ones of 64."""
    first = _mix(seed.to(tl.uint64, bitcast=True))
    bits = _mix(first + (position + 1).to(tl.uint64, bitcast=True) * _GOLDEN)
    return tl.umulhi((bits >> 11) << 11, total.to(tl.uint64)).to(tl.int64)


@triton.jit
def _find_best(row, vocab_size, tile: tl.constexpr):
    """The maximum, the first token that has it, and whether the row is sound."""
    best = tl.full([tile], float("-inf"), tl.float32)
    tokens = tl.zeros([tile], tl.int32)
    is_nan = tl.zeros([tile], tl.int32)
    for start in tl.range(0, vocab_size, tile):
        x = _load(row, start, vocab_size, tile)
        better = x > best
        tokens = tl.where(better, start + tl.arange(0, tile), tokens)
        best = tl.where(better, x, best)
        is_nan = is_nan | (x != x).to(tl.int32)
    highest = tl.max(best, 0)
    token = tl.min(tl.where(best == highest, tokens, _LARGEST_KEY), 0)
    is_finite = (highest > float("-inf")) & (highest < float("inf"))
    return highest, token, is_finite & (tl.max(is_nan, 0) == 0)


@triton.jit
def _survey(row, vocab_size, best, scale, floor, tile: tl.constexpr):
    """Sum of all weights, lowest key that has a weight, lowest key that weighs ``floor``."""
    total = tl.zeros([tile], tl.int64)
    lowest = tl.full([tile], _LARGEST_KEY, tl.int32)
    lowest_kept = tl.full([tile], _LARGEST_KEY, tl.int32)
    for start in tl.range(0, vocab_size, tile):
        x = _load(row, start, vocab_size, tile)
        keys, weights = _keys(x), _weights(x, best, scale)
        total += weights
        lowest = tl.minimum(lowest, tl.where(weights > 0, keys, _LARGEST_KEY))
        lowest_kept = tl.minimum(lowest_kept, tl.where(weights >= floor, keys, _LARGEST_KEY))
    return tl.sum(total, 0), tl.min(lowest, 0), tl.min(lowest_kept, 0)


@triton.jit
def _search(
    row, vocab_size, best, scale, low, high, limit, by_weight: tl.constexpr, tile: tl.constexpr
):
    """The lowest key of the row in [low, high] above which there is less than ``limit``.

    Less weight or fewer tokens; ``low`` and ``high`` occur in the row, and above ``high`` there is
    less.
    """
    while low < high:
        middle = (low & high) + ((low ^ high) >> 1)  # low <= middle < high, without overflow
        measure = tl.zeros([tile], tl.int64)
        next_above = tl.full([tile], _LARGEST_KEY, tl.int32)
        next_below = tl.full([tile], _SMALLEST_KEY, tl.int32)
        for start in tl.range(0, vocab_size, tile):
            x = _load(row, start, vocab_size, tile)
            keys = _keys(x)
            above = keys > middle
            if by_weight:
                measure += tl.where(above, _weights(x, best, scale), 0)
            else:
                measure += above.to(tl.int64)
            next_above = tl.minimum(next_above, tl.where(above, keys, _LARGEST_KEY))
            next_below = tl.maximum(next_below, tl.where(above, _SMALLEST_KEY, keys))
        if tl.sum(measure, 0) < limit:
            high = tl.max(next_below, 0)
        else:
            low = tl.min(next_above, 0)
    return high


@triton.jit
def _split(row, vocab_size, best, scale, threshold, tile: tl.constexpr):
    """Tokens and weight above the key ``threshold``, tokens at it, weight of each of these."""
    count = tl.zeros([tile], tl.int32)
    ties = tl.zeros([tile], tl.int32)
    above_weight = tl.zeros([tile], tl.int64)
    tie_weight = tl.zeros([tile], tl.int64)
    for start in tl.range(0, vocab_size, tile):
        x = _load(row, start, vocab_size, tile)
        keys, weights = _keys(x), _weights(x, best, scale)
        above, is_tie = keys > threshold, keys == threshold
        count += above.to(tl.int32)
        ties += is_tie.to(tl.int32)
        above_weight += tl.where(above, weights, 0)
        tie_weight = tl.maximum(tie_weight, tl.where(is_tie, weights, 0))
    return tl.sum(count, 0), tl.sum(above_weight, 0), tl.sum(ties, 0), tl.max(tie_weight, 0)


@triton.jit
def _filter(row, vocab_size, best, scale, top_k, top_p, min_p, tile: tl.constexpr):
    """What stays: all keys above a threshold and the first few at it.

    Returns the threshold, how many at it, the weight of one of these, and the weight of all.
    """
    floor = tl.ceil(tl.minimum(min_p, 1.0) * _ONE).to(tl.int64)
    floor = tl.maximum(floor, 1)
    total, lowest, threshold = _survey(row, vocab_size, best, scale, floor, tile)
    high, limit = _keys(best), total
    if (top_k > 0) & (top_k < vocab_size):
        key = _search(row, vocab_size, best, scale, lowest, high, top_k, False, tile)
        threshold = tl.maximum(threshold, key)
        above, weight, ties, each = _split(row, vocab_size, best, scale, key, tile)
        limit = weight + tl.minimum(ties, top_k - above) * each
    if top_p < 1.0:
        limit = tl.maximum(tl.ceil(top_p * limit.to(tl.float64)).to(tl.int64), 1)
        threshold = _search(row, vocab_size, best, scale, threshold, high, limit, True, tile)
    _, weight, ties, each = _split(row, vocab_size, best, scale, threshold, tile)
    # A token stays while there is less than the limit before it.
    kept_ties = tl.minimum(ties, tl.cdiv(limit - weight, each))
    return threshold, kept_ties, each, weight + kept_ties * each


@triton.jit
def _pick(row, vocab_size, best, scale, threshold, kept_ties, each, target, tile: tl.constexpr):
    """The kept token, in token order, at which the sum of weights passes ``target``."""
    start = -tile
    passed, here = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    left, ties = kept_ties, kept_ties * 0
    # The sum passes the target; the other bound is for parameters out of range, NaN for one.
    while (passed + here <= target) & (start + tile < vocab_size):
        passed += here
        left -= ties
        start += tile
        x = _load(row, start, vocab_size, tile)
        keys = _keys(x)
        ties = tl.minimum(tl.sum((keys == threshold).to(tl.int64), 0), left)
        above = tl.where(keys > threshold, _weights(x, best, scale), 0)
        here = tl.sum(above, 0) + ties * each
    x = _load(row, start, vocab_size, tile)
    keys = _keys(x)
    is_tie = keys == threshold
    is_kept = (keys > threshold) | (is_tie & (tl.cumsum(is_tie.to(tl.int32), 0) <= left))
    sums = passed + tl.cumsum(tl.where(is_kept, _weights(x, best, scale), 0), 0)
    return tl.minimum(start + tl.sum((sums <= target).to(tl.int32), 0), vocab_size - 1)


@triton.jit
def _draw_kernel(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    positions,
    token_ids,
    is_sound,
    vocab_size,
    row_stride,
    tile: tl.constexpr,
):
    i = tl.program_id(0)
    row = logits + i.to(tl.int64) * row_stride
    best, token, sound = _find_best(row, vocab_size, tile)
    temperature = tl.load(temperatures + i)
    if sound & (temperature > 0.0):
        # Finite, or the best token would weigh 0 · inf.
        scale = tl.minimum(1.0 / temperature * _LOG2_E, 1e30)
        threshold, kept_ties, each, total = _filter(
            row,
            vocab_size,
            best,
            scale,
            tl.load(top_ks + i),
            tl.load(top_ps + i),
            tl.load(min_ps + i),
            tile,
        )
        target = _target(tl.load(seeds + i), tl.load(positions + i), total)
        token = _pick(row, vocab_size, best, scale, threshold, kept_ties, each, target, tile)
    tl.store(token_ids + i, tl.where(sound, token, 0).to(tl.int64))
    tl.store(is_sound + i, sound)


def sample(logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """As :func:`aptserve_kernels.sampling.sample`."""
    adjust(logits, batch)
    return draw(logits, batch)


def draw(logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """As :func:`aptserve_kernels.sampling.draw`, for at most 2^18 tokens.

    Weights are made in float32 here: a random number within about 1e-6 of the edge between two
    tokens may give the other one.
    """
    check_logits(logits)
    num_rows, vocab_size = logits.shape
    if vocab_size > 2**18:
        raise ValueError(f"logits: {vocab_size} tokens are more than 2^18")
    check_vector("temperature", batch.temperature, torch.float32, num_rows)
    for name in ("top_k", "seed", "position"):
        check_vector(name, getattr(batch, name), torch.int64, num_rows)
    for name in ("top_p", "min_p"):
        check_vector(name, getattr(batch, name), torch.float64, num_rows)
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    is_sound = torch.empty(num_rows, dtype=torch.bool, device=logits.device)
    if num_rows:
        _draw_kernel[(num_rows,)](
            logits=logits,
            temperatures=batch.temperature,
            top_ks=batch.top_k,
            top_ps=batch.top_p,
            min_ps=batch.min_p,
            seeds=batch.seed,
            positions=batch.position,
            token_ids=token_ids,
            is_sound=is_sound,
            vocab_size=vocab_size,
            row_stride=logits.stride(0),
            tile=_TILE,
            num_warps=_NUM_WARPS,
        )
    return token_ids, is_sound


def variants() -> Iterator[KernelVariant]:
    """The draw, and what comes before and after it."""
    yield KernelVariant(
        name="any vocabulary",
        kernel=_draw_kernel,
        signature={
            **dict.fromkeys(("logits", "temperatures"), "*fp32"),
            **dict.fromkeys(("top_ps", "min_ps"), "*fp64"),
            **dict.fromkeys(("top_ks", "seeds", "positions", "token_ids"), "*i64"),
            "is_sound": "*i1",
            **dict.fromkeys(("vocab_size", "row_stride"), "i32:16"),
        },
        constants={"tile": _TILE},
        num_warps=_NUM_WARPS,
    )
    yield from _adjust.variants()
