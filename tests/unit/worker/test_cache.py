from __future__ import annotations

import random

import pytest
from aptserve_kernels import UnitGeometry
from aptserve_worker.cache.allocator import UnitAllocator
from aptserve_worker.cache.tables import BlockTables
from aptserve_worker.plan import Tier


def test_allocator_never_gives_a_unit_to_two_owners():
    rng, allocator, held = random.Random(0), UnitAllocator(50), []
    for _ in range(20_000):
        if held and rng.random() < 0.5:
            allocator.free(held.pop(rng.randrange(len(held))))
        else:
            units = allocator.allocate(rng.randrange(0, 9))
            if units is not None:
                held.append(units)
        owned = [u for units in held for u in units]
        assert len(owned) == len(set(owned)) == 50 - allocator.num_free
    allocator.check_integrity()


def test_allocator_says_not_now_and_misuse():
    allocator = UnitAllocator(3)
    units = allocator.allocate(2)
    assert units is not None
    assert allocator.allocate(2) is None
    allocator.free(units)
    with pytest.raises(ValueError, match="not held"):
        allocator.free(units)
    with pytest.raises(ValueError, match="at least 1"):
        UnitAllocator(0)


def test_allocator_integrity_names_the_numbers():
    allocator = UnitAllocator(3)
    allocator._free.pop()
    with pytest.raises(AssertionError, match="0 held \\+ 2 free"):
        allocator.check_integrity()


def test_tables_keep_each_sequence_in_its_row():
    tables = BlockTables(2, 8, {Tier.KV: 2, Tier.HIDDEN: 1})
    a, b = tables.take_row(), tables.take_row()
    assert a is not None
    assert b is not None
    assert tables.take_row() is None
    tables.extend(Tier.KV, a, 0, [4, 5, 6, 7])
    tables.extend(Tier.HIDDEN, b, 0, [1])
    tables.extend(Tier.HIDDEN, b, 1, [9, 3])
    assert tables.table(Tier.KV, a, 2).tolist() == [[4, 5], [6, 7]]
    assert tables.table(Tier.HIDDEN, b, 3).tolist() == [[1], [9], [3]]
    tables.give_row(a)
    assert tables.take_row() == a


@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "hidden", "kv_units", "hidden_units"),
    [
        (12, 64, 768, 2, 1),  # OPT-125m
        (32, 128, 4096, 2, 1),  # Llama-2-7B
        (16, 256, 3072, 8, 3),  # Gemma-7B: 0.375 of its keys and values
        (8, 128, 4096, 2, 0),  # Llama-3-8B: hidden states would be larger
        (4, 8, 36, 2, 0),  # no common divisor that holds whole heads
    ],
)
def test_units_per_block(kv_heads: int, head_dim: int, hidden: int, kv_units, hidden_units):
    g = UnitGeometry.of(block_size=16, num_kv_heads=kv_heads, head_dim=head_dim, hidden_size=hidden)
    assert (g.kv_units, g.hidden_units) == (kv_units, hidden_units)
    assert g.key_units * g.unit_width == kv_heads * head_dim
    if hidden_units:
        assert hidden_units * g.unit_width == hidden
