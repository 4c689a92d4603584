"""Policies by name."""

from __future__ import annotations

import pytest
from aptserve_scheduler.policies import UnknownPolicyError, create_policy, policy_names


def test_every_policy_knows_its_own_name() -> None:
    assert {"apt", "fcfs"} < set(policy_names())
    assert list(policy_names()) == sorted(policy_names())
    for name in policy_names():
        assert create_policy(name).name == name


def test_a_policy_remembers_for_one_scheduler_only() -> None:
    for name in policy_names():
        assert create_policy(name) is not create_policy(name)


@pytest.mark.parametrize("name", ["lottery", "srtf:lottery"])
def test_unknown_name_lists_the_names_there_are(name: str) -> None:
    with pytest.raises(UnknownPolicyError, match=f"'{name}'; there are: ") as raised:
        create_policy(name)
    assert str(raised.value).endswith(", ".join(policy_names()))
