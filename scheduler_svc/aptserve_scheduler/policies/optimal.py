"""The paper's policy with the knapsack solved exactly: what would the optimum buy?

Everything but the solver is :mod:`~aptserve_scheduler.policies.apt`: the kind of iteration, the
values, the tiers, who gives way, and with them what is said there about priorities, tenants and
waiting. :mod:`~aptserve_scheduler.policies.exact` says how it is solved, and when the greedy's
answer stands in; the reason of the decision then says so. The optimum is that of one iteration: no
policy that looks no further ahead can do better by the paper's measure, others may by theirs.

Far slower than ``apt``: for simulations and small services.
"""

from __future__ import annotations

from dataclasses import replace

from aptserve_scheduler.arrays import Ints
from aptserve_scheduler.policies.apt import AptPolicy
from aptserve_scheduler.policies.base import BatchProblem, Decision
from aptserve_scheduler.policies.branch_and_bound import load_scipy
from aptserve_scheduler.policies.exact import ExactConfig, solve
from aptserve_scheduler.policies.greedy import Knapsack


class OptimalPolicy(AptPolicy):
    """``apt`` with the best choice there is in every iteration.

    :class:`MissingSolverError` without SciPy, before any request is accepted.
    """

    name = "optimal"

    def __init__(self, config: ExactConfig | None = None) -> None:
        super().__init__(self._solve)
        load_scipy()
        self.config = config or ExactConfig()
        self._was_optimal = True

    def decide(self, problem: BatchProblem) -> Decision | None:
        """As ``apt`` does; the reason says if the optimum was not found within the limits."""
        self._was_optimal = True
        decision = super().decide(problem)
        if decision is None or self._was_optimal:
            return decision
        return replace(
            decision, reason=f"{decision.reason}; not proven optimal within the search limits"
        )

    def _solve(self, knapsack: Knapsack) -> Ints:
        solution = solve(knapsack, self.config)
        self._was_optimal &= solution.is_optimal
        return solution.choice
