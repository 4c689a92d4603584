"""Branch and bound for the batch-composition problem, by the HiGHS solver that SciPy brings.

Most of the problem is decided before the solver sees it:

1. The linear relaxation, in which parts of a request may be chosen, gives a price for each limited
   resource. At these prices p, with n_ij the needs and v_ij the value of option j of request i,

       bound = p * capacity + sum over i of m_i,    m_i = max(0, max over j of v_ij - p * n_ij)

   is at least what any choice is worth, and at least m_i - (v_ij - p * n_ij) more than any choice
   with option j; m_i more than any without request i.
2. Its whole part, with what is left filled greedily, is a good choice to begin with.
3. What by 1 cannot be part of a choice worth more than that is struck out; requests with one way
   left are settled. The solver gets the rest, one 0/1 variable per option.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from aptserve_scheduler.arrays import Bools, Floats, Ints
from aptserve_scheduler.policies.greedy import NOT_CHOSEN, Knapsack
from aptserve_scheduler.policies.greedy import solve as solve_greedily

_ROUNDING = 1e-12
_WHOLE = 1e-6
"""Distance from 0 or 1 at which the solver's numbers are taken for them."""
_SCALE = 1e6
"""Largest coefficient of the objective; the solver's tolerances are absolute."""
_SOLVED, _INFEASIBLE = 0, 2


class MissingSolverError(ImportError):
    """SciPy is not installed."""

    def __init__(self) -> None:
        super().__init__("the exact solver needs SciPy, which the extra 'simulate' brings")


def load_scipy() -> tuple[Any, Any]:
    """The parts of SciPy that are used; :class:`MissingSolverError` without it."""
    try:
        from scipy import optimize, sparse
    except ImportError as error:
        raise MissingSolverError from error
    return optimize, sparse


def search(
    knapsack: Knapsack, offered: Bools, start: Ints, time_limit_seconds: float, max_nodes: int
) -> tuple[Ints, bool]:
    """The best choice found and whether it is the optimum; never worse than ``start``.

    ``offered`` [k, n]: options worth anything that fit alone. The time limit holds for the
    relaxation and for the search each. :class:`MissingSolverError` without SciPy.
    """
    optimize, sparse = load_scipy()
    program = _Program.of(knapsack, offered, sparse)
    relaxed = optimize.linprog(
        -program.scaled_values,
        A_ub=program.matrix,
        b_ub=program.limits,
        bounds=(0, 1),
        method="highs",
        options={"time_limit": time_limit_seconds},
    )
    if relaxed.status != _SOLVED:
        return start, False
    best = _better(knapsack, start, _filled_up(knapsack, program.choice_of(relaxed.x)))
    scale = program.values.max() / _SCALE
    prices = np.maximum(-relaxed.ineqlin.marginals[: len(knapsack.needs)] * scale, 0.0)
    open_options, may_drop_out = _still_open(knapsack, offered, prices, knapsack.worth(best))
    num_ways = open_options.sum(axis=0) + may_drop_out
    if not num_ways.all():
        return best, True
    settled = np.full(len(num_ways), NOT_CHOSEN)
    has_to = (num_ways == 1) & ~may_drop_out
    settled[has_to] = open_options[:, has_to].argmax(axis=0)
    core = open_options & (num_ways > 1)
    if not core.any():
        return _better(knapsack, best, settled), True
    program = _Program.of(_less(knapsack, settled), core, sparse)
    result = optimize.milp(
        -program.scaled_values,
        integrality=np.ones(len(program.values)),
        bounds=optimize.Bounds(0, 1),
        constraints=optimize.LinearConstraint(program.matrix, -np.inf, program.limits),
        options={"time_limit": time_limit_seconds, "node_limit": max_nodes, "mip_rel_gap": 0.0},
    )
    if result.x is not None:
        found = program.choice_of(result.x)
        best = _better(knapsack, best, np.where(found != NOT_CHOSEN, found, settled))
    return best, result.status in (_SOLVED, _INFEASIBLE)


@dataclass(frozen=True, slots=True, eq=False)
class _Program:
    """One variable per option: limits on the needs, at most one option for each request."""

    options: Ints
    rows: Ints
    num_requests: int
    values: Floats
    matrix: Any
    """Sparse; first the limits, then the requests that have several options."""
    limits: Floats

    @classmethod
    def of(cls, knapsack: Knapsack, offered: Bools, sparse: Any) -> _Program:
        options, rows = offered.nonzero()
        needs = np.stack([need[options, rows] for need in knapsack.needs])
        several = np.flatnonzero(offered.sum(axis=0) > 1)
        of_several = np.flatnonzero(np.isin(rows, several))
        line = np.searchsorted(several, rows[of_several])
        one_each = sparse.csr_array(
            (np.ones(len(line)), (line, of_several)), shape=(len(several), len(rows))
        )
        return cls(
            options=options,
            rows=rows,
            num_requests=offered.shape[1],
            values=knapsack.values[options, rows],
            matrix=sparse.vstack([sparse.csr_array(needs.astype(np.float64)), one_each]),
            limits=np.concatenate([np.array(knapsack.capacity, np.float64), np.ones(len(several))]),
        )

    @property
    def scaled_values(self) -> Floats:
        scaled: Floats = self.values * (_SCALE / self.values.max())
        return scaled

    def choice_of(self, solution: Floats) -> Ints:
        """Option per request, of the variables that are 1."""
        choice = np.full(self.num_requests, NOT_CHOSEN)
        taken = np.flatnonzero(solution >= 1 - _WHOLE)
        choice[self.rows[taken]] = self.options[taken]
        return choice


def _less(knapsack: Knapsack, choice: Ints) -> Knapsack:
    """What is left of the limits after a choice, for all others."""
    rows = np.flatnonzero(choice != NOT_CHOSEN)
    used = [int(need[choice[rows], rows].sum()) for need in knapsack.needs]
    values = knapsack.values.copy()
    values[:, rows] = -np.inf
    capacity = tuple(limit - taken for limit, taken in zip(knapsack.capacity, used, strict=True))
    return Knapsack(values, knapsack.needs, capacity)


def _filled_up(knapsack: Knapsack, choice: Ints) -> Ints:
    """A choice with what it leaves filled greedily; itself if it breaks a limit."""
    rest = _less(knapsack, choice)
    if min(rest.capacity) < 0:
        return choice
    return np.where(choice != NOT_CHOSEN, choice, solve_greedily(rest))


def _better(knapsack: Knapsack, known: Ints, found: Ints) -> Ints:
    """The choice worth more, if the one found is within the limits."""
    is_better = knapsack.fits(found) and knapsack.worth(found) > knapsack.worth(known)
    return found if is_better else known


def _still_open(
    knapsack: Knapsack, offered: Bools, prices: Floats, worth: float
) -> tuple[Bools, Bools]:
    """[k, n] options, and [n] requests to leave out, with which more than ``worth`` may be had."""
    spent = sum(price * need for price, need in zip(prices, knapsack.needs, strict=True))
    gains = np.where(offered, knapsack.values - spent, -np.inf)
    most = np.maximum(gains.max(axis=0), 0.0)
    bound = float(most.sum() + prices @ np.array(knapsack.capacity))
    least = worth * (1 - _ROUNDING)
    return bound - (most - gains) >= least, bound - most >= least
