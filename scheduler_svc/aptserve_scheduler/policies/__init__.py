"""Scheduling policies: each turns a :class:`BatchProblem` into a :class:`Decision`."""

from aptserve_scheduler.policies.base import BatchProblem, Candidates, Decision, Policy
from aptserve_scheduler.policies.registry import (
    UnknownPolicyError,
    create_policy,
    policy_names,
)

__all__ = [
    "BatchProblem",
    "Candidates",
    "Decision",
    "Policy",
    "UnknownPolicyError",
    "create_policy",
    "policy_names",
]
