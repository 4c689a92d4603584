"""Exact solution of the batch-composition problem; slow, for comparison with the greedy.

Three ways, the first that proves its answer:

1. If everybody can have the most valuable option, that is it; the greedy finds it.
2. Dynamic programming over units, the other limits aside: best[c] is the most that the requests so
   far are worth in c units. An answer that keeps the other limits too is the optimum.
3. Otherwise branch and bound (:mod:`~aptserve_scheduler.policies.branch_and_bound`).

Both the tables of the second and the nodes of the third are limited in number, so that equal
knapsacks have equal answers; a limit on time is there for the worst case. What is beyond them gets
the best answer found by then, never worse than the greedy's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aptserve_scheduler.arrays import Bools, Ints
from aptserve_scheduler.policies.branch_and_bound import search
from aptserve_scheduler.policies.greedy import NOT_CHOSEN, Knapsack
from aptserve_scheduler.policies.greedy import solve as solve_greedily

_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class ExactConfig:
    """Limits of the search; ValueError names a field out of range."""

    time_limit_seconds: float = 2.0
    max_nodes: int = 10_000
    """Of branch and bound."""
    max_cells: int = 20_000_000
    """Requests times units in the tables of the dynamic program."""

    def __post_init__(self) -> None:
        if not self.time_limit_seconds > 0:
            raise ValueError(f"time_limit_seconds must be positive, not {self.time_limit_seconds}")
        for name in ("max_nodes", "max_cells"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """A choice within all limits."""

    choice: Ints
    """Option per request, ``NOT_CHOSEN`` for none; shape [n]."""
    is_optimal: bool
    """False if the limits of the search were reached."""


def solve(knapsack: Knapsack, config: ExactConfig | None = None) -> Solution:
    """The most valuable choice. :class:`MissingSolverError` without SciPy, where that is needed."""
    config = config or ExactConfig()
    greedy = solve_greedily(knapsack)
    offered = _offered(knapsack)
    if not offered.any():
        return Solution(greedy, is_optimal=True)
    most = np.where(offered, knapsack.values, 0.0).max(axis=0).sum()
    if knapsack.worth(greedy) >= most * (1 - _ROUNDING):
        return Solution(greedy, is_optimal=True)
    rows = np.flatnonzero(offered.any(axis=0))
    if len(rows) * (_num_steps(knapsack, offered)[1] + 1) <= config.max_cells:
        choice = _by_units(knapsack, offered, rows)
        if knapsack.fits(choice):
            return Solution(choice, is_optimal=True)
    choice, is_optimal = search(
        knapsack, offered, greedy, config.time_limit_seconds, config.max_nodes
    )
    return Solution(choice, is_optimal)


def _offered(knapsack: Knapsack) -> Bools:
    """[k, n] options worth anything that fit alone."""
    offered: Bools = knapsack.values > 0
    for need, limit in zip(knapsack.needs, knapsack.capacity, strict=True):
        offered &= need <= limit
    return offered


def _num_steps(knapsack: Knapsack, offered: Bools) -> tuple[int, int]:
    """Units by which the needs of all options are divisible, and how many of them there are."""
    step = int(np.gcd.reduce(knapsack.needs[0][offered]))
    return step, knapsack.capacity[0] // step


def _by_units(knapsack: Knapsack, offered: Bools, rows: Ints) -> Ints:
    """The optimum for units alone."""
    step, size = _num_steps(knapsack, offered)
    best = np.zeros(size + 1)
    taken = np.full((len(rows), size + 1), NOT_CHOSEN, np.int8)
    needs = (knapsack.needs[0] // step).tolist()
    values = knapsack.values.tolist()
    for entry, row in enumerate(rows.tolist()):
        before = best.copy()
        for option in offered[:, row].nonzero()[0].tolist():
            need = needs[option][row]
            worth = before[: size + 1 - need] + values[option][row]
            better = worth > best[need:]
            best[need:][better] = worth[better]
            taken[entry, need:][better] = option
    choice = np.full(knapsack.values.shape[1], NOT_CHOSEN)
    left = size
    for entry in range(len(rows) - 1, -1, -1):
        option = int(taken[entry, left])
        if option != NOT_CHOSEN:
            choice[rows[entry]] = option
            left -= needs[option][rows[entry]]
    return choice
