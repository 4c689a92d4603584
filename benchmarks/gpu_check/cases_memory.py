"""What moves between rows and the pool, against its twins: bit by bit where nothing is computed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from aptserve_kernels import KeyProjection, LinearMap, Rotary, UnitGeometry, WriteSlots
from aptserve_kernels import reference as ref
from aptserve_kernels.promotion import promote as promote_twin
from aptserve_kernels.quantised import write_kv8 as write_kv8_twin
from torch import Tensor

from benchmarks.gpu_check.caches import Cache, CodeCache, far_away, geometry_of
from benchmarks.gpu_check.cases_attention import code_dtypes_of, several_units, widened
from benchmarks.gpu_check.lab import Check, Checks, Lab, error_of, num_different

_LENGTHS, _DRY_LENGTHS = [1, 16, 0, 333, 64, 17], [1, 16, 0, 21]


def _geometries(lab: Lab) -> list[UnitGeometry]:
    shapes = lab.pick(
        [(12, 64, 16), (6, 80, 32), (5, 96, 64), (40, 128, 16), (2, 256, 16)],
        [(2, 16, 16), (2, 24, 32)],
    )
    made = [geometry_of(heads, dim, block_size=size) for heads, dim, size in shapes]
    return [*made, several_units(lab)]


def _about(lab: Lab, g: UnitGeometry) -> str:
    units = f", {g.key_units} units of keys" if g.key_units > 1 else ""
    return f"{lab.name}: {g.num_kv_heads} heads of {g.head_dim}, blocks {g.block_size}{units}"


def _lengths(lab: Lab) -> list[int]:
    return lab.pick(_LENGTHS, _DRY_LENGTHS)


def write_cache(lab: Lab) -> Checks:
    """Both tiers in one batch of mixed rows, some of which are padding."""
    for g in _geometries(lab):
        yield Check("write_cache", _about(lab, g), 0.0, partial(_write_error, lab, g))
    if not lab.is_dry:
        case = f"{lab.name}: units beyond 2^31 elements"
        g = geometry_of(8, 128)
        yield Check("write_cache", case, 0.0, partial(_write_far_error, lab, g))


def _write_error(lab: Lab, g: UnitGeometry) -> float:
    lengths = _lengths(lab)
    kv = Cache.empty(g, lengths, g.kv_units, lab.dtype, lab.device)
    hidden = Cache.empty(g, lengths, g.hidden_units, lab.dtype, lab.device)
    hidden = replace(hidden, tables=hidden.tables + kv.pool.shape[0])
    pool = torch.cat((kv.pool, hidden.pool, hidden.pool[:1]))
    rows = sum(lengths)
    order = torch.randperm(2 * rows, device=lab.device)
    kv_slots, hidden_slots = kv.kv_slots(), hidden.hidden_slots()
    slots = WriteSlots(
        order[:rows],
        kv_slots.key_slots,
        kv_slots.value_slots,
        order[rows:],
        hidden_slots.hidden_slots,
    )
    # As in a model: parts of one product, so a row is not one piece of memory.
    packed = lab.randn(2 * rows, 3 * g.num_kv_heads, g.head_dim)
    k, v = packed[:, : g.num_kv_heads], packed[:, g.num_kv_heads : 2 * g.num_kv_heads]
    x = lab.randn(2 * rows, g.hidden_size)
    wanted = pool.clone()
    ref.write_cache(wanted, k, v, x, slots)
    lab.kernels.write_cache(pool, k, v, x, slots)
    return num_different(pool, wanted) + _padding_error(lab, pool, k, v, x, slots)


def _padding_error(
    lab: Lab, pool: Tensor, k: Tensor, v: Tensor, x: Tensor, slots: WriteSlots
) -> float:
    """Bytes that rows with negative slots change."""
    none = replace(
        slots,
        key_slots=torch.full_like(slots.key_slots, -1),
        value_slots=torch.full_like(slots.value_slots, -1),
        hidden_slots=torch.full_like(slots.hidden_slots, -1),
        is_padded=True,
    )
    before = pool.clone()
    lab.kernels.write_cache(pool, k + 1, v + 1, x + 1, none)
    return num_different(pool, before)


def _write_far_error(lab: Lab, g: UnitGeometry) -> float:
    near = Cache.of_kv(g, [50, 3], lab.dtype, lab.device)
    far = far_away(near)
    k, v = near.random_heads(), near.random_heads()
    lab.kernels.write_cache(near.pool, k, v, None, near.kv_slots())
    lab.kernels.write_cache(far.pool, k, v, None, far.kv_slots())
    return num_different(far.pool[-len(near.pool) :], near.pool)


def write_kv8(lab: Lab) -> Checks:
    """Codes and scales equal to the twin's, bit by bit; vectors of zeros and of large numbers."""
    for code_dtype in code_dtypes_of(lab):
        name = str(code_dtype).removeprefix("torch.")
        for g in _geometries(lab):
            case = f"{_about(lab, g)}, {name}"
            yield Check("write_kv8", case, 0.0, partial(_write_kv8_error, lab, g, code_dtype))


def _write_kv8_error(lab: Lab, g: UnitGeometry, code_dtype: torch.dtype) -> float:
    made = CodeCache.make(g, _lengths(lab), code_dtype, lab.dtype, lab.device)
    k, v = made.cache.random_heads(), made.cache.random_heads()
    k[0] = 0
    v[-1] *= 1000
    slots = made.cache.code_slots()
    slots[::5] = -1
    wanted, wanted_scales = made.cache.pool.clone(), made.scales.clone()
    write_kv8_twin(wanted, wanted_scales, k, v, slots, g, code_dtype)
    lab.kernels.write_kv8(made.cache.pool, made.scales, k, v, slots, g, code_dtype)
    return num_different(made.cache.pool, wanted) + num_different(made.scales, wanted_scales)


def gather(lab: Lab) -> Checks:
    """Hidden states of a sequence that ends within a block."""
    for g in _geometries(lab):
        yield Check("gather_hidden", _about(lab, g), 0.0, partial(_gather_hidden_error, lab, g))


def _gather_hidden_error(lab: Lab, g: UnitGeometry) -> float:
    cache = Cache.of_hidden(g, _lengths(lab), lab.dtype, lab.device)
    return sum(
        num_different(
            lab.kernels.gather_hidden(cache.pool, table, length, g),
            ref.gather_hidden(cache.pool, table, length, g).contiguous(),
        )
        for table, length in zip(cache.tables, cache.lengths, strict=True)
    )


def promote(lab: Lab) -> Checks:
    """Hidden states replaced by keys and values, in units that the two share."""
    for g in _geometries(lab):
        for about in ("", ", rotary"):
            case = f"{_about(lab, g)}{about}"
            error = partial(_promote_error, lab, g, bool(about))
            yield Check("promote", case, lab.tolerance, error)


def _promote_error(lab: Lab, g: UnitGeometry, has_rotary: bool) -> float:
    length = 21 if lab.is_dry else 777
    cache = Cache.of_hidden(g, [length], lab.dtype, lab.device)
    table = cache.tables[0]
    missing = table.shape[0] * g.kv_units - table.numel()
    pool = torch.cat((cache.pool, cache.pool.new_full((missing, *cache.pool.shape[1:]), 0.5)))
    more = torch.arange(len(cache.pool), len(pool), device=lab.device)
    units = torch.cat((table.flatten(), more))
    kv_table = units[torch.randperm(len(units), device=lab.device)].view(-1, g.kv_units)
    key, value = _maps(lab, g, has_rotary)
    wide = pool.double()
    wide_value = LinearMap(value.weight.double(), None)
    promote_twin(wide, table, kv_table, length, widened(key), wide_value, g)
    lab.kernels.promote(pool, table, kv_table, length, key, value, g)
    return error_of(pool, wide)


def _maps(lab: Lab, g: UnitGeometry, has_rotary: bool) -> tuple[KeyProjection, LinearMap]:
    width, scale = g.num_kv_heads * g.head_dim, g.hidden_size**-0.5
    weights = [lab.randn(width, g.hidden_size, scale=scale) for _ in range(2)]
    angles = torch.rand(1024, g.head_dim, device=lab.device) * 6
    rotary = Rotary(angles.cos().to(lab.dtype), angles.sin().to(lab.dtype))
    key = KeyProjection(
        LinearMap(weights[0], lab.randn(width)), rotary=rotary if has_rotary else None
    )
    return key, LinearMap(weights[1])
