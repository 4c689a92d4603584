"""The parts that the scheduler is built of: queue and ledgers."""

from __future__ import annotations

import random

import numpy as np
import pytest
from aptserve_scheduler.core import IntegrityError, Tier, TierSpec
from aptserve_scheduler.core.ledger import UnitLedger, WorkerCount
from aptserve_scheduler.core.slot_queue import SlotQueue
from support.scheduler import make_worker


def test_a_queue_is_sorted_by_arrival_whatever_the_order_of_adding() -> None:
    rng = random.Random(0)
    queue, known = SlotQueue(), set[int]()
    for _ in range(2000):
        action = rng.random()
        if action < 0.5:
            order = rng.randrange(10_000)
            if order not in known:
                queue.add(order + 7, order)
                known.add(order)
        elif action < 0.6:
            new = [order for order in rng.sample(range(10_000), 5) if order not in known]
            orders = np.array(new, np.int64)
            queue.add_many(orders + 7, orders)
            known.update(new)
        elif known:
            gone = rng.sample(sorted(known), min(len(known), rng.randint(1, 3)))
            queue.remove_many(np.array(gone, np.int64))
            known.difference_update(gone)
        assert queue.orders.tolist() == sorted(known)
        assert queue.slots.tolist() == [order + 7 for order in sorted(known)]
        assert len(queue) == len(known)


@pytest.mark.parametrize("order", [0, 2, 9])
def test_a_queue_does_not_remove_what_it_does_not_hold(order: int) -> None:
    queue = SlotQueue()
    queue.add(10, 1)
    queue.add(30, 3)
    with pytest.raises(LookupError, match="not in this queue"):
        queue.remove(order)
    assert queue.slots.tolist() == [10, 30]


def test_units_are_whole_blocks() -> None:
    tiers = (TierSpec(Tier.KV, 8), TierSpec(Tier.HIDDEN, 3))
    ledger = UnitLedger(make_worker(block_size=4, tiers=tiers))
    lengths = np.array([0, 1, 4, 5])
    assert ledger.units_for(lengths, np.full(4, Tier.KV, np.int8)).tolist() == [0, 8, 8, 16]
    assert ledger.units_for(lengths, np.full(4, Tier.HIDDEN, np.int8)).tolist() == [0, 3, 3, 6]


def test_a_ledger_gives_out_what_it_has_and_takes_back_what_it_gave() -> None:
    ledger = UnitLedger(make_worker(num_units=10))
    ledger.take(10)
    assert ledger.num_free == 0
    with pytest.raises(IntegrityError, match="1 units cannot be taken: 10 of 10 are used"):
        ledger.take(1)
    ledger.take(-10)
    with pytest.raises(IntegrityError):
        ledger.take(-1)
    assert ledger.num_free == 10


def test_bounds_of_a_workers_count() -> None:
    count = WorkerCount()
    count.record(1, 4, 4)
    count.record(2, 0, 6)
    assert count.bounds == (4, 10)
    count.record(1, 8, 8)
    assert count.bounds == (8, 14)
    count.forget([2, 3])
    assert count.bounds == (8, 8)
    assert (count.of(1), count.of(2)) == ((8, 8), (0, 0))
