"""How long ``apt`` goes on decoding the same requests while nothing happens but time passing.

Its decode changes when somebody waiting finds a place, when a promotion fits, or when the value

    max(p_i, s) - U * rho * m_i

of a hidden request changes its sign; s is the predicted decode step. The first two are out of
question while memory is too short for them, as it only gets shorter. For the third:

* p_i of one that sits out grows with time; it is known when it will pass the rest.
* p_i of one that runs starts anew with each token, and nobody knows here how long the iterations
  take: it is sure to stay only as long as s alone is enough.
* Each iteration adds to m_i of those that run and, by their new tokens, to s.
"""

from __future__ import annotations

import math

import numpy as np

from aptserve_scheduler.core.types import Tier
from aptserve_scheduler.policies.apt_view import Rising, View, has_place, least_headroom, num_hurt
from aptserve_scheduler.policies.base import THIS_ITERATION, BatchProblem, Decision, Horizon

_ROUNDING_SECONDS = 1e-9


def repeats(problem: BatchProblem, view: View, decision: Decision) -> Horizon:
    """The horizon of a decode of a view, without promotions; see :meth:`Policy.horizon`."""
    headroom = least_headroom(problem)
    if len(view.ready) < len(problem.running) or has_place(
        problem, view.figures, problem.num_free_units - headroom
    ):
        return THIS_ITERATION
    rising = view.rising
    if rising is None:
        return Horizon() if len(decision.slots) == len(view.ready) else THIS_ITERATION
    most_spare = problem.num_free_units + view.held_units - view.grown_units - headroom
    if rising.least_more_units <= most_spare:
        return THIS_ITERATION
    worth = rising.are_worth
    num_idle = len(worth) - int(np.count_nonzero(worth))
    if len(decision.slots) != len(view.ready) - num_idle:
        return THIS_ITERATION  # not all whose value is positive had room, or nobody's was
    return _while_signs_stay(problem, view, decision, rising)


def _while_signs_stay(
    problem: BatchProblem, view: View, decision: Decision, rising: Rising
) -> Horizon:
    figures, step = view.figures, view.least_pending_seconds
    worth = rising.are_worth
    num_later = until = math.inf
    cost_growth = num_hurt(problem) * float(figures.extra_seconds[Tier.HIDDEN])
    step_growth = float(figures.cached_seconds[decision.tiers].sum())
    staying, idle = rising.cost_seconds[worth], rising.cost_seconds[~worth]
    if len(staying):
        margin = step - float(staying.max()) - _ROUNDING_SECONDS
        num_later = _num_within(margin, cost_growth - step_growth)
        if num_later < 1:
            return THIS_ITERATION
    if len(idle):
        margin = float(idle.min()) - step - _ROUNDING_SECONDS
        num_later = min(num_later, _num_within(margin, step_growth))
        pending = view.pending_seconds[rising.entries[~worth]]
        until = problem.now + float((idle - pending).min()) - _ROUNDING_SECONDS
    return Horizon(1 + num_later, until) if num_later >= 1 else THIS_ITERATION


def _num_within(margin: float, growth: float) -> float:
    """Iterations, each adding ``growth``, after which a margin is not used up; -1 without one."""
    if margin <= 0:
        return -1
    return math.inf if growth <= 0 else math.ceil(margin / growth) - 1
