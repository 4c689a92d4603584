"""Who decodes next under ``apt`` while nothing happens but time passing.

Its decode is decided by the knapsack only when somebody waiting finds a place, when a promotion
fits, or when the next tokens do not all fit. The first two are out of question while memory is too
short for them, as it only gets shorter. What is left is the sign of the value

    max(p_i, s) - U * rho * m_i

of each hidden request, s being the predicted decode step: those with a positive one decode, and all
that hold keys and values. p_i starts anew with each token, m_i and s grow by it, so hidden requests
take turns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aptserve_scheduler.arrays import Bools, Floats, Ints, Tiers
from aptserve_scheduler.policies.apt_view import (
    View,
    decode_step_seconds,
    has_place,
    hidden_cost_seconds,
    least_headroom,
    most_decodes,
    num_hurt,
)
from aptserve_scheduler.policies.base import THIS_ITERATION, BatchProblem, Decision, Horizon
from aptserve_scheduler.policies.tier_rates import TierRates


def horizon_of(problem: BatchProblem, view: View, decision: Decision) -> Horizon:
    """The horizon of a decode of a view, without promotions; see :meth:`Policy.horizon`."""
    headroom = least_headroom(problem)
    if len(view.ready) < len(problem.running) or has_place(
        problem, view.rates, problem.num_free_units - headroom
    ):
        return THIS_ITERATION
    rising = view.rising
    if rising is None:
        return Horizon() if len(decision.slots) == len(view.ready) else THIS_ITERATION
    most_spare = problem.num_free_units + view.held_units - view.grown_units - headroom
    if rising.least_more_units <= most_spare or len(view.ready) > most_decodes(problem):
        return THIS_ITERATION
    num_idle = len(rising.entries) - int(np.count_nonzero(rising.are_worth))
    if len(decision.slots) != len(view.ready) - num_idle:
        return THIS_ITERATION  # not all whose value is positive had room, or nobody's was
    return Horizon(members=_Worthy(view.rates, view.tiers, rising.entries, num_hurt(problem)))


@dataclass(frozen=True, slots=True, eq=False)
class _Worthy:
    """Whose value is positive as he is; a :data:`Members`."""

    rates: TierRates
    tiers: Tiers
    """[n] of all running."""
    rising: Ints
    """Entries of those whose value may be anything else."""
    num_hurt: int

    def __call__(self, now: float, num_cached: Ints, pending_since: Floats) -> Bools:
        rising = self.rising
        step_seconds = decode_step_seconds(self.rates, self.tiers, num_cached)
        pending = np.maximum(now - pending_since[rising], step_seconds)
        worthy = np.ones(len(num_cached), np.bool_)
        worthy[rising] = pending > hidden_cost_seconds(
            self.rates, self.num_hurt, num_cached[rising]
        )
        return worthy
