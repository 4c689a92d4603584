"""Policies by name."""

from __future__ import annotations

import pytest
from aptserve_scheduler.policies import UnknownPolicyError, create_policy, policy_names


def test_every_policy_knows_its_own_name() -> None:
    assert policy_names() == ("apt", "fcfs")
    for name in policy_names():
        assert create_policy(name).name == name


def test_unknown_name_lists_the_names_there_are() -> None:
    with pytest.raises(UnknownPolicyError, match="'lottery'; there are: apt, fcfs"):
        create_policy("lottery")
