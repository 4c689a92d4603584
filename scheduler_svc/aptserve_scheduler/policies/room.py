"""Memory and rows of a worker within one decision: who gets some, and who gives way for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import numpy as np

from aptserve_scheduler.arrays import Bools, Floats, Ints, computed_once, indices
from aptserve_scheduler.policies.base import BatchProblem


class Room:
    """What is free once the running requests have grown, and those who may lose what they hold.

    They do so in this order: the late, latest arrival first; the live that can afford a pause,
    costliest first; the other live, costliest first. Protected ones never do, nor those whose end
    is in flight.
    """

    def __init__(
        self,
        problem: BatchProblem,
        growth: Ints,
        late: Bools,
        can_pause: Bools,
        protected: Bools,
        costs: Callable[[], Floats],
        pays: Callable[[], Bools],
    ) -> None:
        """All arrays are [n] over ``problem.running``.

        ``growth``: units that the next step of each takes; ``can_pause``: whom a long time without
        a token costs no objective; ``costs``: what it costs to let each go on, asked for only once
        somebody live must give way; ``pays``: whose memory is worth computing the cache anew, asked
        for only once somebody could be paused without need.
        """
        running = problem.running
        self.num_free = problem.num_free_units - int(np.add.reduce(growth))
        """Units that nobody holds or is about to; below 0 until :meth:`fit_growth`."""
        self.num_seats = problem.max_num_seqs - len(running)
        """Requests that could start beside those that hold memory."""
        self.gives_way = np.zeros(len(running), np.bool_)
        """[n] who loses the memory."""
        self._running, self._growth = running, growth
        self._costs = costs
        self._pays = pays
        may_give_way = running.schedulable & ~protected
        self._is_live = may_give_way & ~late
        self._can_pause = can_pause
        latest_first = indices(may_give_way & late)[::-1]
        self._late = deque(latest_first.tolist())

    @property
    def num_reachable(self) -> int:
        """Units that are free or held by late requests."""
        return self.num_free + self._held_by(self._late)

    @property
    def num_by_pausing(self) -> int:
        """Units held by those whose pause pays."""
        return self._held_by(self._worth_pausing())

    @property
    def has_late(self) -> bool:
        """Whether a late request could give way."""
        return bool(self._late)

    def fit_growth(self) -> bool:
        """Make what is free cover the growth; False if even then it does not."""
        while self.num_free < 0 and self._late:
            self._evict(self._late.popleft())
        if self.num_free < 0:
            for queue in (self._patient, self._live):
                while self.num_free < 0 and queue:
                    self._evict(queue.popleft())
        return self.num_free >= 0

    def take(self, num_units: int, *, from_late: bool = False, from_live: bool = False) -> bool:
        """A place for a request that needs so much, if need be from others; False: nothing done."""
        if self.num_free < num_units or self.num_seats < 1:
            queues = [self._late] * from_late + [self._patient, self._live] * from_live
            if self.num_free + sum(map(self._held_by, queues)) < num_units:
                return False
            if self.num_seats < 1 and not any(queues):
                return False
            for queue in queues:
                while queue and (self.num_free < num_units or self.num_seats < 1):
                    self._evict(queue.popleft())
        self.num_free -= num_units
        self.num_seats -= 1
        return True

    def take_by_pausing(self, num_units: int) -> bool:
        """A place for a request that needs so much, all of it from some whose pause pays."""
        rows = self._worth_pausing()
        if self._held_by(rows) < num_units:
            return False
        before = self.num_free
        for row in rows:
            if self.num_free - before >= num_units:
                break
            self._patient.remove(row)
            self._evict(row)
        return self.take(num_units)

    @computed_once
    def _released(self) -> list[int]:
        """[n] units that come free when a request gives way."""
        released: list[int] = (self._running.num_units + self._growth).tolist()
        return released

    def _worth_pausing(self) -> list[int]:
        """Those whose pause pays, the costliest first."""
        return [row for row in self._patient if self._is_worth_it[row]] if self._patient else []

    @computed_once
    def _is_worth_it(self) -> list[bool]:
        worth: list[bool] = self._pays().tolist()
        return worth

    @computed_once
    def _patient(self) -> deque[int]:
        return self._costliest_first(self._is_live & self._can_pause)

    @computed_once
    def _live(self) -> deque[int]:
        return self._costliest_first(self._is_live & ~self._can_pause)

    def _costliest_first(self, among: Bools) -> deque[int]:
        rows = indices(among)
        if len(rows) > 1:
            rows = rows[(-self._costs()[rows]).argsort(kind="stable")]
        return deque(rows.tolist())

    def _held_by(self, rows: Iterable[int]) -> int:
        return sum([self._released[row] for row in rows])

    def _evict(self, row: int) -> None:
        self.num_free += self._released[row]
        self.num_seats += 1
        self.gives_way[row] = True
