"""Slots kept in the order in which their requests arrived."""

from __future__ import annotations

import numpy as np

from aptserve_scheduler.arrays import Ints


class SlotQueue:
    """A set of slots, always sorted by arrival number.

    Serves as waiting queue and as running set. A request that comes back after preemption takes
    the place its arrival gives it. Adding the latest arrival costs amortised constant time,
    anything else one move of the arrays behind it.
    """

    def __init__(self) -> None:
        self._orders: Ints = np.empty(64, np.int64)
        self._slots: Ints = np.empty(64, np.int64)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def slots(self) -> Ints:
        """The slots, earliest arrival first; a view that the next change overwrites."""
        return self._slots[: self._size]

    @property
    def orders(self) -> Ints:
        """Arrival numbers of :attr:`slots`."""
        return self._orders[: self._size]

    def add(self, slot: int, order: int) -> None:
        """Put one slot in its place."""
        size = self._size
        if size == len(self._slots):
            self._orders = np.concatenate([self._orders, np.empty_like(self._orders)])
            self._slots = np.concatenate([self._slots, np.empty_like(self._slots)])
        place = size
        if size and order < self._orders[size - 1]:
            place = int(np.searchsorted(self.orders, order))
            self._orders[place + 1 : size + 1] = self._orders[place:size].copy()
            self._slots[place + 1 : size + 1] = self._slots[place:size].copy()
        self._orders[place] = order
        self._slots[place] = slot
        self._size = size + 1

    def add_many(self, slots: Ints, orders: Ints) -> None:
        """Put several slots in their places."""
        if not len(slots):
            return
        all_orders = np.concatenate([self.orders, orders])
        by_arrival = np.argsort(all_orders, kind="stable")
        self._orders = all_orders[by_arrival]
        self._slots = np.concatenate([self.slots, slots])[by_arrival]
        self._size = len(self._slots)

    def remove(self, order: int) -> None:
        """Take out the slot with this arrival number; LookupError if it is not here."""
        size = self._size
        place = int(self.orders.searchsorted(order))
        if place == size or self._orders[place] != order:
            raise LookupError(f"arrival number {order} is not in this queue")
        self._orders[place : size - 1] = self._orders[place + 1 : size].copy()
        self._slots[place : size - 1] = self._slots[place + 1 : size].copy()
        self._size = size - 1

    def remove_many(self, orders: Ints) -> None:
        """Take out the slots with these arrival numbers; LookupError if one is not here."""
        places = np.searchsorted(self.orders, orders)
        here = places < self._size
        if not here.all() or (self._orders[places] != orders).any():
            raise LookupError(f"arrival numbers {orders.tolist()} are not all in this queue")
        keep = np.ones(self._size, np.bool_)
        keep[places] = False
        size = self._size - len(places)
        self._orders[:size] = self.orders[keep]
        self._slots[:size] = self.slots[keep]
        self._size = size

    def clear(self) -> None:
        """Take out everything."""
        self._size = 0
