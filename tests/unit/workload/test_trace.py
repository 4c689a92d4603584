"""Traces check what they are made of."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from aptserve.workload import Lengths, Trace


def make_trace(**changes: Any) -> Trace:
    fields: dict[str, Any] = {
        "name": "three",
        "arrival_seconds": [0.0, 1.0, 4.0],
        "num_prompt_tokens": [3, 4, 5],
        "num_output_tokens": [1, 2, 3],
        "tenants": ("a", "b", "a"),
        "priorities": [0, 0, 1],
        "note": "",
    }
    return Trace(**(fields | changes))


def test_a_trace_counts_its_requests_and_knows_its_rate() -> None:
    trace = make_trace()
    assert len(trace) == 3
    assert trace.rate == 0.5
    assert math.isinf(make_trace(arrival_seconds=[0, 0, 0]).rate)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("arrival_seconds", [], "not empty"),
        ("arrival_seconds", [[0.0]], "one-dimensional"),
        ("arrival_seconds", [0.5, 1.0, 2.0], "first must be 0, not 0.5"),
        ("arrival_seconds", [0.0, 2.0, 1.0], "falls at index 2"),
        ("arrival_seconds", [0.0, 1.0, math.nan], "finite"),
        ("num_prompt_tokens", [3, 0, 5], "at least 1, not 0"),
        ("num_prompt_tokens", [3, 4], "2 entries for 3 requests"),
        ("num_output_tokens", [1.5, 2.0, 3.0], "integers, not float64"),
        ("tenants", ("a",), "1 entries for 3 requests"),
        ("priorities", [0, 0, 0, 0], "4 entries for 3 requests"),
    ],
)
def test_an_error_names_the_field(field: str, value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: .*{reason}"):
        make_trace(**{field: value})


def test_lengths_are_checked_alike() -> None:
    with pytest.raises(ValueError, match=r"^num_output_tokens: has 1 entries for 2 requests"):
        Lengths("two", np.array([1, 2]), np.array([1]))
    with pytest.raises(ValueError, match=r"^num_prompt_tokens: must not be empty"):
        Lengths("none", np.array([], np.int64), np.array([], np.int64))


def test_a_trace_does_not_change_with_the_arrays_it_was_made_of() -> None:
    prompts = np.array([3, 4, 5])
    trace = make_trace(num_prompt_tokens=prompts)
    prompts[0] = 99
    assert trace.num_prompt_tokens.tolist() == [3, 4, 5]
    with pytest.raises(ValueError, match="read-only"):
        trace.num_prompt_tokens[0] = 99


def test_taking_requests_starts_the_clock_with_the_first_of_them() -> None:
    taken = make_trace(note="first").take(np.array([1, 2]), "second")
    assert taken.arrival_seconds.tolist() == [0.0, 3.0]
    assert taken.tenants == ("b", "a")
    assert taken.priorities.tolist() == [0, 1]
    assert taken.note == "first; second"
