"""A recount of everything the books say, for tests and idle moments."""

from __future__ import annotations

import numpy as np

from aptserve_scheduler.arrays import Ints
from aptserve_scheduler.core.errors import IntegrityError
from aptserve_scheduler.core.slot_queue import SlotQueue
from aptserve_scheduler.core.state import State
from aptserve_scheduler.core.table import Status
from aptserve_scheduler.core.worker_state import WorkerState


def check_state(state: State) -> None:
    """Raises :class:`IntegrityError` naming the numbers that disagree."""
    _check_rows(state)
    _check_in_flight(state)
    table = state.table
    _check_members("the queue", state, state.waiting, table.status == Status.WAITING)
    for worker in state.workers.values():
        runs_here = (table.status == Status.RUNNING) & (table.worker == worker.index)
        name = f"worker {worker.spec.worker_id!r}"
        _check_members(name, state, worker.running, runs_here)
        _check_units(name, state, worker)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise IntegrityError(message)


def _check_rows(state: State) -> None:
    table = state.table
    by_status = np.bincount(table.status, minlength=Status.ENDED + 1)
    num_live = int(by_status[Status.WAITING] + by_status[Status.RUNNING])
    _require(len(table) == num_live, f"{len(table)} request ids for {num_live} live rows")
    _require(
        table.num_free_slots == by_status[Status.FREE],
        f"{table.num_free_slots} slots on the free list, {by_status[Status.FREE]} rows are free",
    )
    for request_id, slot in table.slot_of.items():
        request = table.request(slot)
        num_known = len(request.spec.prompt_token_ids) + len(request.output_token_ids)
        _require(
            request.spec.request_id == request_id and table.num_known[slot] == num_known,
            f"slot {slot} says {table.num_known[slot]} tokens for {request_id!r}, "
            f"its record {num_known} for {request.spec.request_id!r}",
        )
    running = table.status == Status.RUNNING
    attached = np.isin(table.worker, list(state.worker_at))
    _require(bool(np.all(attached[running])), "a request runs on a worker that is not attached")
    held = table.units[~running].sum() + table.num_computed[table.status == Status.WAITING].sum()
    _require(int(held) == 0, f"{int(held)} units or computed tokens are held by no running request")


def _check_in_flight(state: State) -> None:
    table = state.table
    recount: Ints = np.zeros(table.capacity, np.int64)
    for worker in state.workers.values():
        for plan in worker.in_flight:
            recount[plan.slots] += 1
    used = table.status != Status.FREE
    wrong = np.flatnonzero((recount != table.in_flight) & used).tolist()
    _require(not wrong, f"plans in flight of slots {wrong} are miscounted")
    stale = np.flatnonzero((table.status == Status.ENDED) & (recount == 0)).tolist()
    _require(not stale, f"ended slots {stale} are in no plan in flight and yet not free")


def _check_members(name: str, state: State, queue: SlotQueue, expected: Ints) -> None:
    slots = queue.slots
    orders = state.table.order[slots]
    _require(
        bool(np.array_equal(orders, queue.orders)) and bool(np.all(np.diff(orders) > 0)),
        f"{name} is out of order: {orders.tolist()} for {queue.orders.tolist()}",
    )
    rows = np.flatnonzero(expected)
    _require(
        bool(np.array_equal(np.sort(slots), rows)),
        f"{name} holds slots {np.sort(slots).tolist()}, the table says {rows.tolist()}",
    )


def _check_units(name: str, state: State, worker: WorkerState) -> None:
    table, ledger, slots = state.table, worker.ledger, worker.running.slots
    due = ledger.units_for(table.num_computed[slots], table.tier[slots])
    _require(
        bool(np.array_equal(due, table.units[slots])),
        f"{name}: rows hold {table.units[slots].tolist()} units, their tokens need {due.tolist()}",
    )
    _require(
        ledger.num_used == int(due.sum()) and 0 <= ledger.num_used <= ledger.num_units,
        f"{name}: {ledger.num_used} of {ledger.num_units} units given out, {int(due.sum())} held",
    )
    sequences = table.sequence[slots]
    _require(
        len(np.unique(sequences)) == len(slots) and bool(np.all(sequences > 0)),
        f"{name}: sequence ids {sequences.tolist()} are not unique",
    )
    if worker.in_flight:
        return
    # Nothing under way: the worker must agree about each running sequence.
    for sequence, units in zip(sequences.tolist(), table.units[slots].tolist(), strict=True):
        theirs = worker.count.of(sequence)
        _require(
            theirs == (units, units),
            f"{name}: sequence {sequence} has {units} units here, {theirs} there",
        )
