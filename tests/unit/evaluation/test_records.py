"""When a request counts as good."""

from dataclasses import replace

import pytest
from aptserve.evaluation import RequestRecord

GOOD = RequestRecord(
    request_id="r",
    arrival_seconds=0.0,
    num_prompt_tokens=4,
    num_output_tokens=2,
    ttft_seconds=1.0,
    tbt_p99_seconds=1.0,
    total_seconds=2.0,
    longest_wait_seconds=1.0,
    completed=True,
    error=None,
    ttft_objective_seconds=1.0,
    tbt_objective_seconds=1.0,
    num_preemptions=0,
)


def test_objectives_are_met_at_their_very_value() -> None:
    assert GOOD.is_good


def test_one_token_is_judged_by_its_ttft_alone() -> None:
    assert replace(GOOD, num_output_tokens=1, tbt_p99_seconds=None).is_good


@pytest.mark.parametrize(
    "changes",
    [
        {"ttft_seconds": 1.1},
        {"ttft_seconds": None},
        {"tbt_p99_seconds": 1.1},
        {"completed": False},
        {"num_output_tokens": 0},
    ],
)
def test_anything_else_is_a_miss(changes: dict[str, object]) -> None:
    assert not replace(GOOD, **changes).is_good  # type: ignore[arg-type]
