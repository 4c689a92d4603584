"""The one entry: which arrivals a source gets, and errors that name the argument."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aptserve.workload import DEFAULT_NUM_REQUESTS, Trace, load_workload, workload_names

Write = Callable[[str, str], Path]


def load(source: object, **changes: Any) -> Trace:
    arguments: dict[str, Any] = {"num_requests": None, "seed": 0}
    return load_workload(str(source), **(arguments | changes))


@pytest.fixture
def arriving(write: Write) -> Path:
    """40 requests, 1 s apart, with prompts of 1 to 40 tokens."""
    rows = "".join(f"{second},{second + 1},5\n" for second in range(40))
    return write("arriving.csv", "arrival_s,input_tokens,output_tokens\n" + rows)


@pytest.fixture
def lengths(write: Write) -> Path:
    rows = "".join(f"{prompt},5\n" for prompt in range(1, 41))
    return write("lengths.csv", "input_tokens,output_tokens\n" + rows)


def test_the_synthetic_workloads_are_those_of_the_paper() -> None:
    assert workload_names() == ("sharegpt", "humaneval", "longbench")


@pytest.mark.parametrize("name", ["sharegpt", "humaneval", "longbench"])
def test_a_synthetic_workload_arrives_as_a_poisson_process(name: str) -> None:
    trace = load(name, rate=4.0)
    assert len(trace) == DEFAULT_NUM_REQUESTS
    assert trace.rate == pytest.approx(4.0, rel=0.15)
    assert "Poisson arrivals at 4/s" in trace.note


def test_the_seed_draws_lengths_and_arrivals_apart() -> None:
    calm, bursty = load("sharegpt", rate=1.0, cv=1.0), load("sharegpt", rate=1.0, cv=5.0)
    assert calm.num_prompt_tokens.tolist() == bursty.num_prompt_tokens.tolist()
    assert calm.arrival_seconds.tolist() != bursty.arrival_seconds.tolist()
    other = load("sharegpt", rate=1.0, cv=1.0, seed=1)
    assert calm.num_prompt_tokens.tolist() != other.num_prompt_tokens.tolist()
    again = load("sharegpt", rate=1.0, cv=1.0)
    assert calm.arrival_seconds.tolist() == again.arrival_seconds.tolist()


def test_real_arrivals_are_kept_scaled_or_replaced(arriving: Path) -> None:
    assert load(arriving).arrival_seconds.tolist() == list(range(40))
    scaled = load(arriving, rate=2.0)
    assert np.diff(scaled.arrival_seconds).tolist() == pytest.approx([0.5] * 39)
    drawn = load(arriving, rate=2.0, cv=3.0)
    assert np.diff(drawn.arrival_seconds).std() > 0.2
    assert drawn.num_prompt_tokens.tolist() == list(range(1, 41))


def test_a_sample_of_real_arrivals_is_scaled_after_it_was_taken(arriving: Path) -> None:
    trace = load(arriving, num_requests=10, rate=5.0)
    assert len(trace) == 10
    assert trace.rate == pytest.approx(5.0)


def test_lengths_get_poisson_arrivals(lengths: Path) -> None:
    trace = load(lengths, rate=2.0, num_requests=20)
    assert len(trace) == 20
    assert "Poisson" in trace.note


def test_a_context_cuts_where_arrivals_are_real_and_drops_where_not(
    arriving: Path, lengths: Path
) -> None:
    assert load(arriving, max_total_tokens=25).num_prompt_tokens.max() == 20
    assert len(load(arriving, max_total_tokens=25)) == 40
    assert len(load(lengths, max_total_tokens=25, rate=1.0)) == 20
    assert len(load(lengths, max_total_tokens=25, rate=1.0, num_requests=20)) == 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "sharegtp"}, "source: 'sharegtp' is neither a file nor one of sharegpt"),
        ({}, "rate: is needed, sharegpt has no arrivals"),
        ({"cv": 2.0}, "cv: needs a rate"),
        ({"rate": -1.0}, "rate: must be above 0"),
        ({"rate": 1.0, "cv": -1.0}, "cv: must be at least 0"),
        ({"rate": 1.0, "num_requests": 0}, "num_requests: must be at least 1"),
        ({"rate": 1.0, "seed": -1}, "seed: must be at least 0"),
        ({"rate": 1.0, "max_total_tokens": 1}, "max_total_tokens: must be at least 2"),
    ],
)
def test_an_error_names_the_argument(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        load(**({"source": "sharegpt"} | changes))
