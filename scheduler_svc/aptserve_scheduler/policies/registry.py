"""Policies by name. A new one is a file and a line in ``_FACTORIES``."""

from __future__ import annotations

from collections.abc import Callable

from aptserve_scheduler.policies.apt import AptPolicy
from aptserve_scheduler.policies.base import Policy
from aptserve_scheduler.policies.fcfs import FcfsPolicy

_FACTORIES: dict[str, Callable[[], Policy]] = {
    "apt": AptPolicy,
    "fcfs": FcfsPolicy,
}


class UnknownPolicyError(ValueError):
    """No policy has this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"unknown policy {name!r}; there are: {', '.join(policy_names())}")


def policy_names() -> tuple[str, ...]:
    """All names, sorted."""
    return tuple(sorted(_FACTORIES))


def create_policy(name: str) -> Policy:
    """A policy by its name; :class:`UnknownPolicyError` lists the names there are."""
    factory = _FACTORIES.get(name)
    if factory is None:
        raise UnknownPolicyError(name)
    return factory()
