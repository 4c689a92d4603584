"""Attention kernels against their twins, which compute in float64 (codes: in float32)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from aptserve_kernels import AttentionParams, KeyProjection, LinearMap, Rotary, UnitGeometry
from aptserve_kernels import reference as ref
from aptserve_kernels.batch import HeadNorm
from torch import Tensor

from benchmarks.gpu_check.caches import Cache, CodeCache, far_away, geometry_of
from benchmarks.gpu_check.lab import (
    BOTH,
    CAPPED,
    PLAIN,
    WINDOW,
    Check,
    Checks,
    Lab,
    describe,
    error_of,
)

_PARAMS = (PLAIN, WINDOW, CAPPED, BOTH)
_LENGTHS, _DRY_LENGTHS = [1, 15, 16, 17, 0, 64, 333, 4097], [1, 16, 0, 37]
_LONG, _DRY_LONG = [6001], [150]
_MANY, _DRY_MANY = [513 + 7 * i for i in range(64)], [9] * 6
_NEW, _OF = [1, 16, 33, 128, 5, 257, 1], [1, 16, 300, 128, 0, 1000, 700]
_DRY_NEW, _DRY_OF = [1, 5, 3, 17], [1, 20, 0, 17]

_HEADS = [
    # (KV heads, query heads of each, head size, block size)
    (4, 1, 64, 16),
    (2, 4, 80, 32),
    (3, 1, 96, 64),
    (8, 1, 128, 16),
    (4, 4, 128, 16),
    (2, 8, 128, 32),
    (2, 12, 128, 16),
    (2, 2, 256, 16),
]
_DRY_HEADS = [(2, 1, 16, 16), (2, 4, 48, 32)]


def decode_kv(lab: Lab) -> Checks:
    """Sizes of heads and blocks, then many sequences, one long one, several units, far units."""
    for kv_heads, group, head_dim, block_size in lab.pick(_HEADS, _DRY_HEADS):
        g = geometry_of(kv_heads, head_dim, block_size=block_size)
        for params in _PARAMS if group == 4 else (PLAIN, BOTH):
            yield _decode_kv(lab, g, group, _lengths(lab), params)
    g = geometry_of(*lab.pick((4, 128), (2, 16)))
    yield _decode_kv(lab, g, 2, lab.pick(_LONG, _DRY_LONG), PLAIN, "one long, ")
    yield _decode_kv(lab, g, 1, lab.pick(_MANY, _DRY_MANY), PLAIN, "many, ")
    yield _decode_kv(lab, several_units(lab), 2, _lengths(lab), PLAIN, "3 units of keys, ")
    if not lab.is_dry:
        yield _decode_kv(lab, g, 1, [70, 3], PLAIN, "units beyond 2^31 elements, ", is_far=True)


def _lengths(lab: Lab) -> list[int]:
    return lab.pick(_LENGTHS, _DRY_LENGTHS)


def several_units(lab: Lab) -> UnitGeometry:
    """Keys in 3 units, hidden states in 2."""
    dim = 16 if lab.is_dry else 128
    return geometry_of(6, dim, hidden=4 * dim)


def _decode_kv(
    lab: Lab,
    g: UnitGeometry,
    group: int,
    lengths: list[int],
    params: AttentionParams,
    about: str = "",
    is_far: bool = False,
) -> Check:
    def error() -> float:
        cache = Cache.of_kv(g, lengths, lab.dtype, lab.device)
        q = lab.randn(len(lengths), g.num_kv_heads * group, g.head_dim)
        wanted = ref.decode_kv(q.double(), cache.pool.double(), cache.decode_batch(), params)
        used = far_away(cache) if is_far else cache
        return error_of(lab.kernels.decode_kv(q, used.pool, used.decode_batch(), params), wanted)

    case = f"{about}{_heads(g, group)}{describe(params)}"
    return Check("decode_kv", f"{lab.name}: {case}", lab.tolerance, error)


def _heads(g: UnitGeometry, group: int) -> str:
    return f"{g.num_kv_heads * group}/{g.num_kv_heads} heads of {g.head_dim}, blocks {g.block_size}"


def decode_kv8(lab: Lab) -> Checks:
    """Codes of every kind that the device has."""
    for code_dtype in code_dtypes_of(lab):
        for kv_heads, group, head_dim, block_size in lab.pick(_HEADS, _DRY_HEADS):
            g = geometry_of(kv_heads, head_dim, block_size=block_size)
            yield _decode_kv8(lab, g, group, code_dtype, BOTH if group == 4 else PLAIN)
        yield _decode_kv8(lab, several_units(lab), 2, code_dtype, PLAIN)


def code_dtypes_of(lab: Lab) -> tuple[torch.dtype, ...]:
    """Those that a pool of the lab's dtype can hold on its device."""
    from aptserve_kernels.gpu.tiles import code_dtypes, target_of

    return code_dtypes(lab.dtype, target_of(lab.device))


def _decode_kv8(
    lab: Lab, g: UnitGeometry, group: int, code_dtype: torch.dtype, params: AttentionParams
) -> Check:
    def error() -> float:
        lengths = _lengths(lab)
        made = CodeCache.make(g, lengths, code_dtype, lab.dtype, lab.device)
        q = lab.randn(len(lengths), g.num_kv_heads * group, g.head_dim)
        batch, scales = made.cache.decode_batch(), made.scales
        wanted = ref.decode_kv8(q.float(), made.wide_pool(), scales, batch, params, code_dtype)
        got = lab.kernels.decode_kv8(q, made.cache.pool, scales, batch, params, code_dtype)
        return error_of(got, wanted)

    codes = str(code_dtype).removeprefix("torch.")
    case = f"{lab.name}: {codes}, {_heads(g, group)}{describe(params)}"
    return Check("decode_kv8", case, lab.tolerance, error)


def prefill_kv(lab: Lab) -> Checks:
    """Chunks after a context, whole prompts, single tokens and padding in one batch."""
    return _prefills(lab, "prefill_kv", _prefill_kv_error)


def attend_ragged(lab: Lab) -> Checks:
    """As :func:`prefill_kv`, without blocks."""
    return _prefills(lab, "attend_ragged", _attend_ragged_error)


_PrefillError = Callable[[Lab, UnitGeometry, int, AttentionParams], float]


def _prefills(lab: Lab, kernel: str, error: _PrefillError) -> Checks:
    for kv_heads, group, head_dim, block_size in lab.pick(_HEADS, _DRY_HEADS):
        g = geometry_of(kv_heads, head_dim, block_size=block_size)
        for params in _PARAMS if group == 4 else (PLAIN,):
            case = f"{lab.name}: {_heads(g, group)}{describe(params)}"
            yield Check(kernel, case, lab.tolerance, partial(error, lab, g, group, params))


def _prefill_kv_error(lab: Lab, g: UnitGeometry, group: int, params: AttentionParams) -> float:
    cache = Cache.of_kv(g, lab.pick(_OF, _DRY_OF), lab.dtype, lab.device)
    batch = cache.prefill_batch(lab.pick(_NEW, _DRY_NEW))
    q = lab.randn(int(batch.query_starts[-1]), g.num_kv_heads * group, g.head_dim)
    wanted = ref.prefill_kv(q.double(), cache.pool.double(), batch, params)
    return error_of(lab.kernels.prefill_kv(q, cache.pool, batch, params), wanted)


def _attend_ragged_error(lab: Lab, g: UnitGeometry, group: int, params: AttentionParams) -> float:
    cache = Cache.of_kv(g, lab.pick(_OF, _DRY_OF), lab.dtype, lab.device)
    batch = cache.prefill_batch(lab.pick(_NEW, _DRY_NEW))
    k, v = cache.random_heads(), cache.random_heads()
    q = lab.randn(int(batch.query_starts[-1]), g.num_kv_heads * group, g.head_dim)
    wanted = ref.attend_ragged(q.double(), k.double(), v.double(), batch, params)
    return error_of(lab.kernels.attend_ragged(q, k, v, batch, params), wanted)


def prefill_kv8(lab: Lab) -> Checks:
    """Codes of every kind that the device has."""
    for code_dtype in code_dtypes_of(lab):
        for kv_heads, group, head_dim, block_size in lab.pick(_HEADS, _DRY_HEADS):
            g = geometry_of(kv_heads, head_dim, block_size=block_size)
            params = BOTH if group == 4 else PLAIN
            codes = str(code_dtype).removeprefix("torch.")
            case = f"{lab.name}: {codes}, {_heads(g, group)}{describe(params)}"
            error = partial(_prefill_kv8_error, lab, g, group, params, code_dtype)
            yield Check("prefill_kv8", case, lab.tolerance, error)


def _prefill_kv8_error(
    lab: Lab, g: UnitGeometry, group: int, params: AttentionParams, code_dtype: torch.dtype
) -> float:
    lengths = lab.pick(_OF, _DRY_OF)
    made = CodeCache.make(g, lengths, code_dtype, lab.dtype, lab.device)
    batch = made.cache.prefill_batch(lab.pick(_NEW, _DRY_NEW))
    q = lab.randn(int(batch.query_starts[-1]), g.num_kv_heads * group, g.head_dim)
    scales = made.scales
    wanted = ref.prefill_kv8(q.float(), made.wide_pool(), scales, batch, params, code_dtype)
    got = lab.kernels.prefill_kv8(q, made.cache.pool, scales, batch, params, code_dtype)
    return error_of(got, wanted)


def decode_hidden(lab: Lab) -> Checks:
    """Few and many heads, several units, one long sequence, many, and far units."""
    heads = lab.pick([(12, 64, 16), (32, 80, 32), (40, 128, 16), (64, 128, 64)], [(4, 16, 16)])
    for num_heads, head_dim, block_size in heads:
        g = geometry_of(num_heads, head_dim, block_size=block_size)
        for params in _PARAMS if num_heads in (4, 40) else (PLAIN,):
            yield _decode_hidden(lab, g, num_heads, _lengths(lab), params)
    g = several_units(lab)
    yield _decode_hidden(lab, g, 12, _lengths(lab), WINDOW, "2 units, ")
    g = geometry_of(*lab.pick((40, 128), (4, 16)))
    yield _decode_hidden(lab, g, g.num_kv_heads, lab.pick(_LONG, _DRY_LONG), BOTH, "one long, ")
    yield _decode_hidden(lab, g, g.num_kv_heads, lab.pick(_MANY, _DRY_MANY), PLAIN, "many, ")
    if not lab.is_dry:
        about = "units beyond 2^31 elements, "
        yield _decode_hidden(lab, g, g.num_kv_heads, [70, 3], PLAIN, about, is_far=True)


def _decode_hidden(
    lab: Lab,
    g: UnitGeometry,
    num_heads: int,
    lengths: list[int],
    params: AttentionParams,
    about: str = "",
    is_far: bool = False,
) -> Check:
    def error() -> float:
        cache = Cache.of_hidden(g, lengths, lab.dtype, lab.device)
        # Scores that differ by a few units, so that the softmax is neither flat nor sharp.
        folded = lab.randn(len(lengths), num_heads, g.hidden_size, scale=6 / g.hidden_size**0.5)
        wanted = _wide_decode_hidden(folded, cache, params)
        used = far_away(cache) if is_far else cache
        got = lab.kernels.decode_hidden(folded, used.pool, used.decode_batch(), params)
        return error_of(got, wanted)

    case = f"{about}{num_heads} heads, width {g.hidden_size}, blocks {g.block_size}"
    return Check("decode_hidden", f"{lab.name}: {case}{describe(params)}", lab.tolerance, error)


def _wide_decode_hidden(folded: Tensor, cache: Cache, params: AttentionParams) -> Tensor:
    """The twin one head after the other: it repeats the states for each, in float64."""
    pool, batch = cache.pool.double(), cache.decode_batch()
    heads = [
        ref.decode_hidden(head, pool, batch, params) for head in torch.split(folded.double(), 8, 1)
    ]
    return torch.cat(heads, 1)


def decode_projected(lab: Lab) -> Checks:
    """Rotations of both kinds and of a part of a head, norm and bias, with the options of scores.

    Without a norm, with the one that the kernel knows, and with one that it does not.
    """
    shapes = lab.pick(
        [(8, 1, 64, 16), (4, 2, 96, 16), (16, 1, 128, 16), (8, 4, 128, 32), (4, 1, 256, 16)],
        [(2, 2, 16, 16)],
    )
    for kv_heads, group, head_dim, block_size in shapes:
        width = kv_heads * head_dim
        hidden = width if group == 1 else width * 3 // 2
        g = geometry_of(kv_heads, head_dim, block_size=block_size, hidden=hidden)
        is_main = head_dim in (16, 128)
        for about, projection in _projections(lab, g, is_main):
            for params in (PLAIN, BOTH) if is_main else (PLAIN,):
                yield _decode_projected(lab, g, group, projection, params, about)


def _projections(lab: Lab, g: UnitGeometry, is_main: bool) -> list[tuple[str, KeyProjection]]:
    width = g.num_kv_heads * g.head_dim
    weight = lab.randn(width, g.hidden_size, scale=g.hidden_size**-0.5)
    linear = LinearMap(weight, lab.randn(width))
    angles = torch.rand(8192, g.head_dim, device=lab.device) * 6
    whole = Rotary(angles.cos().to(lab.dtype), angles.sin().to(lab.dtype))
    found = [("rotary", KeyProjection(linear, rotary=whole))]
    if not is_main:
        return found
    half = g.head_dim // 2
    part = replace(whole, cos=whole.cos[:, :half], sin=whole.sin[:, :half], interleaved=True)
    norm = HeadNorm(1 + lab.randn(g.head_dim, scale=0.1), 1e-6)
    return [
        *found,
        ("interleaved rotary of half a head", KeyProjection(linear, rotary=part)),
        ("norm and rotary", KeyProjection(LinearMap(weight), norm, whole)),
        ("another norm", KeyProjection(linear, lambda k: norm(k), whole)),
    ]


def _decode_projected(
    lab: Lab,
    g: UnitGeometry,
    group: int,
    projection: KeyProjection,
    params: AttentionParams,
    about: str,
) -> Check:
    def error() -> float:
        lengths = _lengths(lab)
        cache = Cache.of_hidden(g, lengths, lab.dtype, lab.device)
        q = lab.randn(len(lengths), g.num_kv_heads * group, g.head_dim, scale=g.head_dim**-0.25)
        wanted = ref.decode_projected(
            q.double(), cache.pool.double(), cache.decode_batch(), params, widened(projection)
        )
        got = lab.kernels.decode_projected(q, cache.pool, cache.decode_batch(), params, projection)
        return error_of(got, wanted)

    case = f"{lab.name}: {about}, {_heads(g, group)}{describe(params)}"
    return Check("decode_projected", case, lab.tolerance, error)


def widened(projection: KeyProjection) -> KeyProjection:
    """The same projection for a twin in float64."""
    linear, rotary = projection.map, projection.rotary
    bias = None if linear.bias is None else linear.bias.double()
    if rotary is not None:
        rotary = replace(rotary, cos=rotary.cos.double(), sin=rotary.sin.double())
    return replace(projection, map=LinearMap(linear.weight.double(), bias), rotary=rotary)
