"""Policies that exist for tests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from aptserve_scheduler.core import Tier, TierSpec
from aptserve_scheduler.policies import BatchProblem, Decision
from aptserve_scheduler.policies.fcfs import FcfsPolicy


class MixingPolicy(FcfsPolicy):
    """First come, first served, every other new request in the hidden tier.

    In each decode one hidden cache is promoted if keys and values fit beside what everybody needs.
    So what happens does not depend on how long anything was measured to take.
    """

    name = "mixing"

    def usable_tiers(self, tiers: tuple[TierSpec, ...]) -> tuple[TierSpec, ...]:
        """All."""
        return tiers

    def decide(self, problem: BatchProblem) -> Decision | None:
        """As first come, first served does, in other tiers."""
        decision = super().decide(problem)
        if decision is None:
            return None
        tiers = decision.tiers.copy()
        is_new = ~np.isin(decision.slots, problem.running.slots)
        if is_new.any():
            tiers[is_new & (np.arange(len(tiers)) % 2 == 1)] = Tier.HIDDEN
        elif not len(decision.preempted):
            tiers = _promote_one(problem, decision)
        return replace(decision, tiers=tiers)


def _promote_one(problem: BatchProblem, decision: Decision) -> np.ndarray:
    running = problem.running
    order = np.argsort(running.slots)
    rows = order[np.searchsorted(running.slots[order], decision.slots)]
    lengths = running.num_computed_tokens[rows] + decision.num_tokens
    others = problem.num_units - problem.num_free_units - int(running.num_units[rows].sum())
    for entry in np.flatnonzero(decision.tiers == Tier.HIDDEN):
        tiers = decision.tiers.copy()
        tiers[entry] = Tier.KV
        if others + int(problem.num_units_for(lengths, tiers).sum()) <= problem.num_units:
            return tiers
    return decision.tiers
