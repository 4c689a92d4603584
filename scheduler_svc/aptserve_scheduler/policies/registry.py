"""Policies by name. A new one is a file and a line in ``_FACTORIES``.

A variant, the same policy with other settings, is a line named ``policy:variant``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from aptserve_scheduler.policies.apt import AptPolicy
from aptserve_scheduler.policies.apt_slo import AptSloConfig, AptSloPolicy
from aptserve_scheduler.policies.base import Policy
from aptserve_scheduler.policies.chunked import ChunkedPolicy
from aptserve_scheduler.policies.fcfs import FcfsPolicy
from aptserve_scheduler.policies.mlfq import MlfqPolicy
from aptserve_scheduler.policies.optimal import OptimalPolicy
from aptserve_scheduler.policies.qos import QosConfig, QosPolicy
from aptserve_scheduler.policies.srtf import SrtfConfig, SrtfPolicy
from aptserve_scheduler.policies.vtc import VtcPolicy
from aptserve_scheduler.policies.wait import WaitConfig, WaitPolicy

_FACTORIES: dict[str, Callable[[], Policy]] = {
    "apt": AptPolicy,
    "apt-slo": AptSloPolicy,
    "apt-slo:steady": lambda: AptSloPolicy(AptSloConfig(pauses=False)),
    "apt-slo:unbounded": lambda: AptSloPolicy(AptSloConfig(patience_seconds=math.inf)),
    "chunked": ChunkedPolicy,
    "fcfs": FcfsPolicy,
    "mlfq": MlfqPolicy,
    "optimal": OptimalPolicy,
    "qos": QosPolicy,
    "qos:eager": lambda: QosPolicy(QosConfig(relegated_share=1.0), "qos:eager"),
    "srtf": SrtfPolicy,
    "srtf:noisy": lambda: SrtfPolicy(SrtfConfig("noisy")),
    "srtf:oracle": lambda: SrtfPolicy(SrtfConfig("oracle")),
    "vtc": VtcPolicy,
    "wait": WaitPolicy,
    "wait:oracle": lambda: WaitPolicy(WaitConfig(is_oracle=True)),
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
