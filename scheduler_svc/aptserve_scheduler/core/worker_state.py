"""One attached worker as the scheduler sees it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from aptserve_scheduler.arrays import Bools, Floats, Ints, Tiers
from aptserve_scheduler.core.cost import CostModel, features
from aptserve_scheduler.core.ledger import UnitLedger, WorkerCount
from aptserve_scheduler.core.slot_queue import SlotQueue
from aptserve_scheduler.core.types import PlanId, RequestId, SequenceId, Tier, TierSpec, WorkerSpec


@dataclass(frozen=True, slots=True, eq=False)
class PlanInFlight:
    """What must be remembered of a plan until its result comes; entries are parallel."""

    plan_id: PlanId
    release: tuple[SequenceId, ...]
    slots: Ints
    request_ids: tuple[RequestId, ...]
    sequence_ids: tuple[SequenceId, ...]
    tiers: Tiers
    starts: Ints
    """Tokens cached before the plan."""
    num_tokens: Ints
    """Tokens computed in the plan."""
    units_before: Ints
    units_after: Ints
    is_new: Bools
    """Sequences that start with the plan."""
    promoted: Bools

    @property
    def ends(self) -> Ints:
        """Tokens cached after the plan."""
        return self.starts + self.num_tokens

    def cost_features(self, ran: Bools, tiers: tuple[Tier, ...]) -> Floats:
        """Row for the cost model of those entries that ran."""
        return features(self.starts[ran], self.num_tokens[ran], self.tiers[ran], tiers)


class WorkerState:
    """Pool, running requests, plans in flight and speed of one worker."""

    def __init__(
        self,
        spec: WorkerSpec,
        index: int,
        usable_tiers: tuple[TierSpec, ...],
        *,
        learns_costs: bool = True,
    ) -> None:
        validate_worker(spec)
        self.spec = spec
        self.index = index
        """Number that stands for the worker in the request table."""
        self.usable_tiers = usable_tiers
        self.is_usable_tier = np.zeros(np.iinfo(np.int8).max + 1, np.bool_)
        """By the tier's number."""
        self.is_usable_tier[[tier.tier for tier in usable_tiers]] = True
        self.ledger = UnitLedger(spec)
        self.count = WorkerCount()
        self.learns_costs = learns_costs
        self.cost = CostModel(spec.cost, tuple(tier.tier for tier in spec.tiers))
        self.running = SlotQueue()
        self.in_flight: deque[PlanInFlight] = deque()
        self.releases: list[SequenceId] = []
        """Ended or preempted sequences that no plan or message has told the worker about."""
        self.next_plan_id = 1
        self.next_sequence_id = 1
        self.num_steps = 0
        self.step_seconds = 0.0
        self.gap_seconds = 0.0
        smallest = min(tier.units_per_block for tier in usable_tiers)
        self.max_request_tokens = spec.num_units // smallest * spec.block_size
        """Longest request, prompt and output, that the empty pool can hold."""

    @property
    def gap_share(self) -> float:
        """Share of the time between steps in all time that was not idle."""
        busy = self.step_seconds + self.gap_seconds
        return self.gap_seconds / busy if busy > 0 else 0.0

    def take_releases(self) -> tuple[SequenceId, ...]:
        """The releases not told yet, which count as told from now on."""
        releases = tuple(self.releases)
        self.releases.clear()
        return releases


def validate_worker(spec: WorkerSpec) -> None:
    """ValueError naming the field if a worker advertises what cannot be."""
    for name in ("num_units", "block_size", "max_num_seqs", "max_num_batched_tokens"):
        value = getattr(spec, name)
        if value < 1:
            raise ValueError(f"worker {spec.worker_id!r}: {name} must be at least 1, not {value}")
    if not spec.tiers or spec.tiers[0].tier != Tier.KV:
        raise ValueError(f"worker {spec.worker_id!r}: tiers must start with KV")
    if len({tier.tier for tier in spec.tiers}) != len(spec.tiers):
        raise ValueError(f"worker {spec.worker_id!r}: a tier is listed twice")
    for tier in spec.tiers:
        if tier.units_per_block < 1:
            raise ValueError(
                f"worker {spec.worker_id!r}: units_per_block of {tier.tier.name} must be "
                f"at least 1, not {tier.units_per_block}"
            )
