"""Every live request as one row of numpy columns, so that a decision loops over no request.

A row is a *slot*. What changes per iteration stands in columns; what is only handed through (the
specification, the tokens, the times for the final report) stands in :class:`Request` objects.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aptserve_scheduler.arrays import Bools, Floats, Ints, Tiers
from aptserve_scheduler.core.types import RequestId, RequestSpec

NO_WORKER = -1
NO_SEQUENCE = 0


class Status:
    """Where a slot is in its life. ``ENDED`` rows wait for their plans in flight to come back.

    Plain numbers, not an enumeration: every iteration compares columns with them, and numpy takes
    several times as long to compare with a member of one.
    """

    FREE = 0
    WAITING = 1
    RUNNING = 2
    ENDED = 3


class Request:
    """The part of a request that no decision needs."""

    __slots__ = (
        "first_taken_at",
        "first_token_at",
        "gap_seconds",
        "num_preemptions",
        "output_token_ids",
        "spec",
    )

    def __init__(self, spec: RequestSpec) -> None:
        self.spec = spec
        self.output_token_ids: list[int] = list(spec.resume_token_ids)
        self.first_taken_at: float | None = None
        self.first_token_at: float | None = None
        self.gap_seconds: list[float] = []
        """Times between tokens sent since arrival here, in order."""
        self.num_preemptions = 0

    @property
    def known_token_ids(self) -> Sequence[int]:
        """Prompt, then every output token known."""
        if not self.output_token_ids:
            return self.spec.prompt_token_ids
        return [*self.spec.prompt_token_ids, *self.output_token_ids]


class RequestTable:
    """Columns of all live requests and the free list of slots.

    Token counts: ``num_known`` tokens have a value here (prompt and received output);
    ``num_computed`` have, or will have once the plans in flight have run, their cache on a worker.
    When computing reaches the last known token a further one is sampled, so the request's length
    as plans see it is ``max(num_known, num_computed + 1)`` whatever a step returns.
    """

    _COLUMNS = (
        ("status", np.int8),
        ("order", np.int64),
        ("arrival", np.float64),
        ("pending_since", np.float64),
        ("ttft_objective", np.float64),
        ("tbt_objective", np.float64),
        ("priority", np.int64),
        ("expected_output", np.int64),
        ("num_prompt", np.int64),
        ("num_known", np.int64),
        ("num_computed", np.int64),
        ("max_total", np.int64),
        ("worker", np.int64),
        ("tier", np.int8),
        ("units", np.int64),
        ("sequence", np.int64),
        ("in_flight", np.int64),
        ("num_gaps", np.int64),
        ("num_slow_gaps", np.int64),
        ("has_token", np.bool_),
        ("missed_ttft", np.bool_),
        ("miss_after", np.float64),
    )

    status: Tiers
    order: Ints
    """Arrival number; kept through preemption and worker loss."""
    arrival: Floats
    pending_since: Floats
    """Time of the last token, of the arrival before the first."""
    ttft_objective: Floats
    tbt_objective: Floats
    priority: Ints
    expected_output: Ints
    """The caller's guess of the output length, 0 where there is none."""
    num_prompt: Ints
    num_known: Ints
    num_computed: Ints
    max_total: Ints
    """Prompt tokens plus ``max_tokens``."""
    worker: Ints
    tier: Tiers
    units: Ints
    sequence: Ints
    in_flight: Ints
    """Plans in flight that contain the request, under whatever sequence id."""
    num_gaps: Ints
    num_slow_gaps: Ints
    """Gaps between tokens so far, and those over the objective."""
    has_token: Bools
    missed_ttft: Bools
    """The first token came too late."""
    miss_after: Floats
    """Pending time beyond which the request would not meet its objectives if its wait ended then;
    negative once it would not in any case. See :meth:`judge`."""

    def __init__(self, capacity: int = 256) -> None:
        self._capacity = 0
        self._free: list[int] = []
        self._next_order = 1
        self.requests: list[Request | None] = []
        self.request_ids: list[RequestId] = []
        self.slot_of: dict[RequestId, int] = {}
        self._grow(capacity)

    def __len__(self) -> int:
        """Live requests."""
        return len(self.slot_of)

    @property
    def capacity(self) -> int:
        """Rows, free ones included."""
        return self._capacity

    @property
    def num_free_slots(self) -> int:
        """Rows that hold nothing."""
        return len(self._free)

    def add(self, spec: RequestSpec, now: float) -> int:
        """Fill a row with a request that arrived now; returns its slot."""
        if not self._free:
            self._grow(2 * self._capacity)
        slot = self._free.pop()
        for name, _ in self._COLUMNS:
            getattr(self, name)[slot] = 0
        self.status[slot] = Status.WAITING
        self.order[slot] = self._next_order
        self.arrival[slot] = self.pending_since[slot] = now
        self.ttft_objective[slot] = spec.objectives.ttft_seconds
        self.tbt_objective[slot] = spec.objectives.tbt_seconds
        self.miss_after[slot] = spec.objectives.ttft_seconds
        self.priority[slot] = spec.priority
        self.expected_output[slot] = spec.expected_output_tokens or 0
        num_prompt = len(spec.prompt_token_ids)
        self.num_prompt[slot] = num_prompt
        self.num_known[slot] = num_prompt + len(spec.resume_token_ids)
        self.max_total[slot] = num_prompt + spec.max_tokens
        self.worker[slot] = NO_WORKER
        self._next_order += 1
        self.requests[slot] = Request(spec)
        self.request_ids[slot] = spec.request_id
        self.slot_of[spec.request_id] = slot
        return slot

    def end(self, slot: int) -> None:
        """Mark the row's request as over; the row is reused once no plan in flight names it."""
        del self.slot_of[self.request_ids[slot]]
        self.status[slot] = Status.ENDED
        if self.in_flight[slot] == 0:
            self._free_row(slot)

    def return_from_flight(self, slots: Ints) -> None:
        """One plan with these slots came back."""
        self.in_flight[slots] -= 1
        ended = slots[self.status[slots] == Status.ENDED]
        for slot in ended[self.in_flight[ended] == 0].tolist():
            self._free_row(slot)

    def request(self, slot: int) -> Request:
        """The record of a row in use."""
        request = self.requests[slot]
        if request is None:
            raise LookupError(f"slot {slot} holds no request")
        return request

    def records(self, slots: Ints) -> list[Request]:
        """The records of rows in use."""
        requests = self.requests
        records = [row for slot in slots.tolist() if (row := requests[slot]) is not None]
        if len(records) < len(slots):
            raise LookupError(f"not all of the slots {slots.tolist()} hold a request")
        return records

    def ids(self, slots: Ints) -> tuple[RequestId, ...]:
        """The ids of requests."""
        request_ids = self.request_ids
        return tuple([request_ids[slot] for slot in slots.tolist()])

    def num_tokens(self, slots: Ints) -> Ints:
        """Length of each request in tokens, those that plans in flight will sample included."""
        return np.maximum(self.num_known[slots], self.num_computed[slots] + 1)

    def judge(self, slots: Ints) -> None:
        """Set ``miss_after`` of requests that got tokens just now.

        A late first token is missed for good. The P99 of the gaps is judged as it stands: nearest
        rank leaves floor(n / 100) of n gaps above it.
        """
        num_to_spare = self.num_gaps[slots] - 100 * self.num_slow_gaps[slots]
        miss_after = self.tbt_objective[slots]
        # One more gap, a slow one: 100 * (num_slow + 1) <= num_gaps + 1.
        miss_after[num_to_spare >= 99] = np.inf
        miss_after[self.missed_ttft[slots] | (num_to_spare < 0)] = -1.0
        self.miss_after[slots] = miss_after

    def num_gaps_until_live(self, slots: Ints) -> int:
        """Gaps within the objectives after which the first of the late among these is not any more.

        A late first token is not made good by anything.
        """
        missing = 100 * self.num_slow_gaps[slots] - self.num_gaps[slots]
        can_be_live = (missing > 0) & ~self.missed_ttft[slots]
        return int(np.minimum.reduce(missing[can_be_live], initial=np.iinfo(np.int64).max))

    def _free_row(self, slot: int) -> None:
        self.status[slot] = Status.FREE
        self.requests[slot] = None
        self._free.append(slot)

    def _grow(self, capacity: int) -> None:
        added = capacity - self._capacity
        for name, dtype in self._COLUMNS:
            old = getattr(self, name) if self._capacity else np.zeros(0, dtype)
            setattr(self, name, np.concatenate([old, np.zeros(added, dtype)]))
        self.requests.extend([None] * added)
        self.request_ids.extend([RequestId("")] * added)
        self.worker[self._capacity :] = NO_WORKER
        # Popped from the end, so low slots go first.
        self._free = list(range(capacity - 1, self._capacity - 1, -1)) + self._free
        self._capacity = capacity
