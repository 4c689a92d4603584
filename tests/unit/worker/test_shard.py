"""How a cache is divided over ranks: nothing is lost, nothing is held twice."""

from __future__ import annotations

import pytest
import torch
from aptserve_kernels import UnitGeometry
from aptserve_worker.parallel.shard import Shard
from hypothesis import given
from hypothesis import strategies as st


def geometry(hidden_size: int = 64) -> UnitGeometry:
    return UnitGeometry.of(block_size=16, num_kv_heads=4, head_dim=16, hidden_size=hidden_size)


def shards(size: int, whole: UnitGeometry) -> list[Shard]:
    return [Shard.of(rank, size, whole) for rank in range(size)]


@given(st.sampled_from([1, 2, 4]), st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_every_token_is_held_once(size: int, lengths: list[int]):
    parts, positions = shards(size, geometry()), torch.arange(200)
    assert torch.stack([p.holds(positions) for p in parts]).sum(0).eq(1).all()
    for part in parts:
        held = [int(part.holds(torch.arange(n)).sum()) for n in lengths]
        assert part.count(torch.tensor(lengths)).tolist() == held
    for length in lengths:
        counts = [int(part.count(torch.tensor(length))) for part in parts]
        assert sum(counts) == length
        assert max(counts) == parts[0].most(length)


@given(st.sampled_from([1, 2, 4]), st.sampled_from([64, 96]), st.integers(1, 120))
def test_hidden_states_come_back_in_order(size: int, hidden_size: int, num_tokens: int):
    """What each rank stores through its slots, its view of the pool gives back."""
    whole = geometry(hidden_size)
    x, positions = torch.randn(num_tokens, hidden_size), torch.arange(num_tokens)
    blocks = whole.num_blocks(num_tokens)
    table = torch.randperm(blocks * whole.hidden_units).view(blocks, whole.hidden_units)
    back = torch.empty_like(x)
    for part in shards(size, whole):
        if not part.kv.hidden_units:
            assert hidden_size == 96  # units of 32: of two heads, which four ranks cannot share
            return
        pool = torch.full((blocks * whole.hidden_units, 16, part.kv.unit_width), float("nan"))
        own = positions[part.holds(positions)]
        slots = part.hidden_slots(table[own // 16], own).view(-1)
        pool.view(-1, part.kv.unit_width)[slots] = x[own].view(-1, part.kv.unit_width)
        units = part.hidden_view(pool)[table.view(-1)]
        local = units.view(blocks, whole.hidden_units, -1, whole.unit_width).transpose(1, 2)
        back[own] = local.reshape(-1, hidden_size)[: len(own)]
    assert torch.equal(back, x)


@pytest.mark.parametrize("size", [2, 4])
def test_units_shrink_and_their_number_stays(size: int):
    whole = geometry()
    for part in shards(size, whole):
        assert part.kv.kv_units == whole.kv_units
        assert part.kv.hidden_units == whole.hidden_units
        assert part.kv.unit_elements * size == whole.unit_elements
        assert part.hidden.unit_elements == part.kv.unit_elements
        assert part.num_blocks(33) == whole.num_blocks(33)


def test_no_hidden_tier_where_a_block_does_not_divide():
    odd = UnitGeometry.of(block_size=9, num_kv_heads=4, head_dim=16, hidden_size=64)
    part = Shard.of(1, 2, odd)
    assert part.kv.hidden_units == 0
    assert part.kv.num_kv_heads == 2
    assert part.kv.kv_units == 2
