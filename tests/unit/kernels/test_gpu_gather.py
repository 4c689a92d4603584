"""The kernels that copy a sequence's cache and that move it to another tier."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from aptserve_kernels import KeyProjection, LinearMap, Rotary, UnitGeometry
from aptserve_kernels import reference as ref
from aptserve_kernels.gpu.gather import gather_hidden
from aptserve_kernels.gpu.promote import promote, rotate_and_write
from aptserve_kernels.promotion import promote as promote_reference
from support.caches import PagedCache, make_geometry
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GEOMETRIES = {
    "one unit": make_geometry(heads=4, head_dim=16),
    "several units": make_geometry(heads=4, head_dim=8, hidden=48),
    "odd head": make_geometry(heads=3, head_dim=24, block_size=16),
    "real": make_geometry(heads=3, head_dim=128, block_size=32),
}
LENGTHS = [33, 1, 16, 15]


def _filled(geometry: UnitGeometry, dtype: torch.dtype) -> PagedCache:
    cache = PagedCache.make(geometry, LENGTHS, tier_units=geometry.hidden_units, dtype=dtype)
    rows = sum(LENGTHS)
    k = torch.randn(rows, geometry.num_kv_heads, geometry.head_dim).to(dtype)
    x = torch.randn(rows, geometry.hidden_size).to(dtype)
    ref.write_cache(cache.pool, k, k + 1, x, cache.slots(hidden=True))
    return cache


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_gather(geometry: UnitGeometry, dtype: torch.dtype):
    torch.manual_seed(0)
    cache = _filled(geometry, dtype)
    for table, length in zip(cache.tables, LENGTHS, strict=True):
        got = gather_hidden(cache.pool, table, length, geometry)
        assert got.is_contiguous()
        assert torch.equal(got, ref.gather_hidden(cache.pool, table, length, geometry))


def test_gather_no_tokens_and_at_most_what_the_table_holds():
    geometry = make_geometry(heads=2, head_dim=16)
    pool = torch.randn(3, 4, 32)
    table = torch.tensor([[1], [2]])
    assert gather_hidden(pool, table[:1], 0, geometry).shape == (0, 32)
    assert torch.equal(gather_hidden(pool, table, 2**62, geometry), pool[1:].view(8, 32))


def test_what_breaks_the_contract_of_a_gather_is_named():
    geometry = make_geometry(heads=2, head_dim=16)
    pool, table = torch.zeros(3, 4, 32), torch.tensor([[1], [2]])
    cases = [
        ("pool", pool[:, :2], table),
        ("table", pool, table.int()),
        ("table", pool, table.view(1, 2)),
    ]
    for name, wrong_pool, wrong_table in cases:
        with pytest.raises(ValueError, match=f"^{name}: "):
            gather_hidden(wrong_pool, wrong_table, 3, geometry)


def _rotary(dim: int, *, interleaved: bool = False) -> Rotary:
    angles = torch.rand(80, dim) * 6
    return Rotary(angles.cos(), angles.sin(), interleaved)


def _rms_norm(k: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(k, k.shape[-1:])


def _projections(geometry: UnitGeometry, dtype: torch.dtype) -> tuple[KeyProjection, LinearMap]:
    width, size = geometry.num_kv_heads * geometry.head_dim, geometry.hidden_size

    def weight() -> Tensor:
        return (torch.randn(width, size) / size**0.5).to(dtype)

    bias = torch.randn(width).to(dtype)
    return KeyProjection(LinearMap(weight(), bias)), LinearMap(weight(), bias.flip(0))


ROTATIONS = {
    "none": lambda head_dim: None,
    "halves": _rotary,
    "pairs": lambda head_dim: _rotary(head_dim, interleaved=True),
    "part": lambda head_dim: _rotary(head_dim // 4 * 2),
    "part in pairs": lambda head_dim: _rotary(head_dim // 4 * 2, interleaved=True),
}


CASES = [
    *((layout, rotation, torch.float32) for layout in GEOMETRIES for rotation in ROTATIONS),
    *(("real", "halves", dtype) for dtype in DTYPES[1:]),
]


@pytest.mark.parametrize(("layout", "rotation", "dtype"), CASES)
def test_promotion(layout: str, rotation: str, dtype: torch.dtype):
    torch.manual_seed(0)
    geometry = GEOMETRIES[layout]
    cache = _filled(geometry, dtype)
    key, value = _projections(geometry, dtype)
    key = replace(key, rotary=ROTATIONS[rotation](geometry.head_dim), norm=_rms_norm)
    # The sequence keeps its units in the first columns and gets the rest from the free ones.
    table, length = cache.tables[0], LENGTHS[0]
    spare = torch.cat(cache.tables[1:]).view(-1)[: 2 * table.numel()]
    kv_table = torch.cat((table.view(-1), spare))[: table.shape[0] * geometry.kv_units]
    kv_table = kv_table.view(table.shape[0], geometry.kv_units)

    before, wanted = cache.pool.clone(), cache.pool.clone()
    promote_reference(wanted, table, kv_table, length, key, value, geometry)
    promote(cache.pool, table, kv_table, length, key, value, geometry)
    # The reference rounds every product of the rotation, the kernel the result alone.
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(
        cache.pool, wanted, rtol=2 * epsilon, atol=8 * epsilon, equal_nan=True
    )
    untouched = torch.ones(len(cache.pool), dtype=torch.bool)
    untouched[kv_table.view(-1)] = False
    assert torch.equal(cache.pool[untouched].isnan(), before[untouched].isnan())
    assert torch.equal(cache.pool[untouched].nan_to_num(), before[untouched].nan_to_num())


def test_keys_and_values_are_as_a_prefill_stores_them():
    torch.manual_seed(1)
    geometry = make_geometry(heads=4, head_dim=16)
    cache = _filled(geometry, torch.float32)
    key, value = _projections(geometry, torch.float32)
    rotary = _rotary(16)
    x = ref.gather_hidden(cache.pool, cache.tables[0], 33, geometry)
    k = ref.rotate(key.map(x).view(33, 4, 16), torch.arange(33), rotary)
    kv_table = torch.cat(cache.tables).view(-1)[: 9 * geometry.kv_units].view(9, -1)
    promote(cache.pool, cache.tables[0], kv_table, 33, replace(key, rotary=rotary), value, geometry)
    got_k, got_v = ref.gather_kv(cache.pool, kv_table, 33, geometry)
    torch.testing.assert_close(got_k, k)
    torch.testing.assert_close(got_v, value(x).view(33, 4, 16))


def test_what_breaks_the_contract_of_a_write_is_named():
    geometry = make_geometry(heads=2, head_dim=16)
    pool, table = torch.zeros(5, 4, 32), torch.tensor([[1, 2]])
    k, rotary = torch.zeros(3, 2, 16), _rotary(16)
    short = Rotary(rotary.cos[:2], rotary.sin[:2])
    cases = [
        ("pool", pool[:, :2], k, table, None),
        ("k", pool, k.half(), table, None),
        ("k", pool, k[:, :1], table, None),
        ("table", pool, k, table[:, :1], None),
        ("table", pool, torch.zeros(5, 2, 16), table, None),
        ("cos", pool, k, table, short),
        ("cos", pool, k, table, _rotary(32)),
    ]
    for name, wrong_pool, keys, wrong_table, turning in cases:
        with pytest.raises(ValueError, match=f"^{name}: "):
            rotate_and_write(wrong_pool, keys, keys, wrong_table, turning, geometry)
