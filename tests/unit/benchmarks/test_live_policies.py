"""Goodput and ratios from the attainments of runs."""

from collections.abc import Mapping
from typing import Any

import pytest

from benchmarks.live_policies import compare
from benchmarks.live_service import POLICIES, interleaved


def make_runs(policy: str, *seeds: Mapping[float, float]) -> list[dict[str, Any]]:
    return [
        {"policy": policy, "seed": seed, "requests_per_second": rate, "both": share}
        for seed, attainment in enumerate(seeds)
        for rate, share in attainment.items()
    ]


def test_goodput_lies_between_the_rates_around_the_target() -> None:
    result = compare(
        make_runs("fcfs", {1.0: 1.0, 2.0: 0.8}, {1.0: 1.0, 2.0: 0.8})
        + make_runs("apt", {1.0: 1.0, 2.0: 1.0, 4.0: 0.8}, {1.0: 1.0, 2.0: 1.0, 4.0: 0.8})
    )
    assert result["fcfs"]["goodput_requests_per_second"] == pytest.approx(1.5)
    assert result["apt"]["ratio_to_fcfs"] == pytest.approx(2.0)
    assert result["apt"]["ratio_half_width"] == pytest.approx(0.0)
    assert result["apt"]["ratio_is_at_least"] is False


def test_a_goodput_beyond_all_rates_bounds_the_ratio_from_below() -> None:
    result = compare(
        make_runs("fcfs", {1.0: 1.0, 2.0: 0.8}) + make_runs("apt", {1.0: 1.0, 2.0: 0.95})
    )
    assert result["apt"]["bound"] == "at_least"
    assert result["apt"]["ratio_is_at_least"] is True
    assert result["apt"]["ratio_half_width"] is None


def test_a_goodput_under_all_rates_has_no_ratio() -> None:
    result = compare(
        make_runs("fcfs", {1.0: 1.0, 2.0: 0.8}) + make_runs("apt", {1.0: 0.5, 2.0: 0.4})
    )
    assert result["apt"]["bound"] == "below"
    assert result["apt"]["ratio_to_fcfs"] is None
    assert result["fcfs"]["ratio_to_fcfs"] == 1.0


def test_policies_take_turns_at_going_first() -> None:
    cases = interleaved((0.5, 1.0), (1, 2))
    groups = [cases[i : i + len(POLICIES)] for i in range(0, len(cases), len(POLICIES))]
    assert [group[0].policy for group in groups] == list(POLICIES)
    for group in groups:
        assert {case.policy for case in group} == set(POLICIES)
        assert len({(case.times, case.seed) for case in group}) == 1
