"""The kernel that stores new tokens, against the reference."""

from __future__ import annotations

import psutil
import pytest
import torch
from aptserve_kernels import UnitGeometry, WriteSlots
from aptserve_kernels import reference as ref
from aptserve_kernels.gpu import gather
from aptserve_kernels.gpu.write import write_cache
from aptserve_kernels.index import head_rows, hidden_rows, split_kv
from support.caches import PagedCache, make_geometry
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NONE = torch.zeros(0, dtype=torch.int64)
GEOMETRIES = {
    "one unit": make_geometry(heads=4, head_dim=16),
    "several units": make_geometry(heads=4, head_dim=8, hidden=48),
    "odd head": make_geometry(heads=3, head_dim=24, block_size=16),
    "real": make_geometry(heads=12, head_dim=64, block_size=16),
    "wider than a tile": make_geometry(heads=14, head_dim=80, block_size=16),
}


def _inputs(geometry: UnitGeometry, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """K, V and layer input as a model may give them: parts of larger tensors."""
    g = geometry
    fused = torch.randn(rows, g.num_kv_heads, 2 * g.head_dim + 8).to(dtype)
    k, v = fused[..., : g.head_dim], fused[..., g.head_dim : 2 * g.head_dim]
    return k, v, torch.randn(rows, g.hidden_size + 8).to(dtype)[:, : g.hidden_size]


def _assert_same(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("lengths", [[1], [16, 1, 5]])
def test_all_rows_in_one_tier(geometry: UnitGeometry, lengths: list[int], dtype: torch.dtype):
    torch.manual_seed(0)
    k, v, x = _inputs(geometry, sum(lengths), dtype)
    for hidden in (False, True):
        units = geometry.hidden_units if hidden else geometry.kv_units
        cache = PagedCache.make(geometry, lengths, tier_units=units, dtype=dtype)
        wanted, slots = cache.pool.clone(), cache.slots(hidden=hidden)
        ref.write_cache(wanted, k, v, x, slots)
        write_cache(cache.pool, k, v, x if hidden else None, slots)
        _assert_same(cache.pool, wanted)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_rows_of_both_tiers_with_padding_between_them(geometry: UnitGeometry):
    torch.manual_seed(1)
    rows, g = 11, geometry
    k, v, x = _inputs(g, rows, torch.float16)
    order = torch.randperm(rows)
    kv_rows, state_rows = order[:6], order[6:]
    num_units = 6 * g.kv_units + 5 * g.hidden_units
    pool = torch.full((num_units, g.block_size, g.unit_width), float("nan"), dtype=k.dtype)
    units, offsets = torch.randperm(num_units), torch.arange(rows) % g.block_size
    key_units, value_units = split_kv(units[: 6 * g.kv_units].view(6, -1), g)
    key_slots = head_rows(key_units, offsets[:6], g)
    value_slots = head_rows(value_units, offsets[:6], g)
    state_slots = hidden_rows(units[6 * g.kv_units :].view(5, -1), offsets[6:], g)
    real_kv, real_states = torch.arange(6) % 3 != 1, torch.arange(5) != 0

    # The reference knows no padding and gets the other rows alone.
    wanted = pool.clone()
    ref.write_cache(
        wanted,
        k,
        v,
        x,
        WriteSlots(
            kv_rows[real_kv],
            key_slots[real_kv].view(-1),
            value_slots[real_kv].view(-1),
            state_rows[real_states],
            state_slots[real_states].view(-1),
        ),
    )
    for slots, is_real in (
        (key_slots, real_kv),
        (value_slots, real_kv),
        (state_slots, real_states),
    ):
        slots[~is_real] = -1
    write_cache(
        pool,
        k,
        v,
        x,
        WriteSlots(
            kv_rows, key_slots.view(-1), value_slots.view(-1), state_rows, state_slots.view(-1)
        ),
    )
    _assert_same(pool, wanted)


def test_nothing_to_write():
    cache = PagedCache.make(make_geometry(), [3], tier_units=2)
    before = cache.pool.clone()
    empty = torch.zeros(0, 4, 8)
    write_cache(cache.pool, empty, empty, None, WriteSlots(None, NONE, NONE, None, NONE))
    _assert_same(cache.pool, before)


def test_what_breaks_the_contract_is_named():
    geometry = make_geometry(heads=2, head_dim=16)
    cache = PagedCache.make(geometry, [5], tier_units=geometry.kv_units)
    slots, k = cache.slots(hidden=False), torch.zeros(5, 2, 16)
    turned = torch.zeros(5, 16, 2).transpose(1, 2)
    states = WriteSlots(None, NONE, NONE, None, torch.zeros(5, dtype=torch.int64))
    cases = [
        ("pool", lambda: write_cache(cache.pool[:, :2], k, k, None, slots)),
        ("k", lambda: write_cache(cache.pool, turned, k, None, slots)),
        ("v", lambda: write_cache(cache.pool, k, k.half(), None, slots)),
        ("slots", lambda: write_cache(cache.pool, k[:3], k[:3], None, slots)),
        ("x", lambda: write_cache(cache.pool, k, k, None, states)),
        ("x", lambda: write_cache(cache.pool, k, k, torch.zeros(5, 40), states)),
    ]
    for name, call in cases:
        with pytest.raises(ValueError, match=f"^{name}: "):
            call()


@pytest.mark.skipif(
    psutil.virtual_memory().available < 6 * 2**30, reason="needs a pool of 4 GiB in memory"
)
def test_a_pool_with_more_elements_than_int32_counts():
    g = make_geometry(heads=16, head_dim=64, block_size=16)
    num_units = 2**31 // g.unit_elements + 3
    pool = torch.empty(num_units, g.block_size, g.unit_width, dtype=torch.float16)
    k, v, x = _inputs(g, 3, torch.float16)
    kv_table = torch.tensor([[num_units - 1, num_units - 2]])
    state_table = torch.tensor([[num_units - 3]])
    offsets = torch.arange(3)
    slots = WriteSlots(
        torch.arange(3),
        head_rows(kv_table[:, :1].expand(3, 1), offsets, g).view(-1),
        head_rows(kv_table[:, 1:].expand(3, 1), offsets, g).view(-1),
        torch.arange(3),
        hidden_rows(state_table.expand(3, 1), offsets, g).view(-1),
    )
    write_cache(pool, k, v, x, slots)
    got_k, got_v = ref.gather_kv(pool, kv_table, 3, g)
    _assert_same(got_k, k)
    _assert_same(got_v, v)
    for which in (ref, gather):
        _assert_same(which.gather_hidden(pool, state_table, 3, g), x)
