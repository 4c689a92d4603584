"""Scaling, new arrivals, samples and clipping."""

from __future__ import annotations

import numpy as np
import pytest
from aptserve.workload import (
    Lengths,
    Trace,
    clipped,
    sampled,
    scaled_to_rate,
    with_gamma_arrivals,
)
from hypothesis import given, settings
from hypothesis import strategies as st


def make_lengths(num_requests: int) -> Lengths:
    """Requests told apart by their prompts: 1, 2, 3, ..."""
    prompts = np.arange(1, num_requests + 1)
    return Lengths("numbered", prompts, np.full(num_requests, 7))


def make_trace(gaps: list[float]) -> Trace:
    arrivals = np.concatenate([[0.0], np.cumsum(gaps)])
    n = len(arrivals)
    return Trace(
        "numbered",
        arrivals,
        np.arange(1, n + 1),
        np.full(n, 7),
        tuple(f"t{index}" for index in range(n)),
        np.arange(n),
        "",
    )


GAPS = st.lists(st.floats(0.001, 1e4), min_size=1, max_size=30)
RATES = st.floats(1e-3, 1e4)


@settings(deadline=None)
@given(GAPS, RATES)
def test_scaling_reaches_the_rate_by_one_factor(gaps: list[float], rate: float) -> None:
    trace = make_trace(gaps)
    scaled = scaled_to_rate(trace, rate)
    assert scaled.rate == pytest.approx(rate)
    factor = trace.rate / rate
    np.testing.assert_allclose(np.diff(scaled.arrival_seconds), np.array(gaps) * factor, rtol=1e-6)
    assert scaled.num_prompt_tokens.tolist() == trace.num_prompt_tokens.tolist()
    assert f"{rate:.4g}/s" in scaled.note


def test_a_single_request_needs_no_scaling_and_a_single_moment_allows_none() -> None:
    assert len(scaled_to_rate(make_trace([]), 3.0)) == 1
    with pytest.raises(ValueError, match=r"^rate: .* all its arrivals at once"):
        scaled_to_rate(make_trace([0.0]), 3.0)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_a_rate_must_be_a_positive_number(rate: float) -> None:
    with pytest.raises(ValueError, match=r"^rate: must be above 0"):
        scaled_to_rate(make_trace([1.0]), rate)
    with pytest.raises(ValueError, match=r"^rate: must be above 0"):
        with_gamma_arrivals(make_lengths(2), rate, 1.0, seed=0)


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0, 5.0])
def test_gamma_gaps_have_the_mean_and_the_variation_asked_for(cv: float) -> None:
    gaps = np.diff(with_gamma_arrivals(make_lengths(100_000), 4.0, cv, seed=1).arrival_seconds)
    assert gaps.mean() == pytest.approx(0.25, rel=5 * cv / np.sqrt(len(gaps)))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.06)


def test_cv_1_is_a_poisson_process_and_0_is_even() -> None:
    gaps = np.diff(with_gamma_arrivals(make_lengths(50_000), 1.0, 1.0, seed=2).arrival_seconds)
    assert (gaps > 1).mean() == pytest.approx(np.exp(-1), abs=0.01)
    even = with_gamma_arrivals(make_lengths(3), 2.0, 0.0, seed=2)
    assert even.arrival_seconds.tolist() == [0.0, 0.5, 1.0]


def test_gamma_arrivals_at_two_rates_differ_by_one_factor() -> None:
    slow = with_gamma_arrivals(make_lengths(50), 1.0, 5.0, seed=3)
    fast = with_gamma_arrivals(make_lengths(50), 4.0, 5.0, seed=3)
    np.testing.assert_allclose(slow.arrival_seconds, 4 * fast.arrival_seconds)


def test_gamma_arrivals_are_equal_for_an_equal_seed_only() -> None:
    first, again, other = (
        with_gamma_arrivals(make_lengths(20), 1.0, 2.0, seed).arrival_seconds for seed in (5, 5, 6)
    )
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


def test_new_arrivals_keep_a_trace_otherwise() -> None:
    trace = make_trace([1.0, 1.0])
    redrawn = with_gamma_arrivals(trace, 1.0, 1.0, seed=0)
    assert redrawn.tenants == trace.tenants
    assert redrawn.priorities.tolist() == trace.priorities.tolist()
    assert "Poisson" in redrawn.note


@pytest.mark.parametrize("cv", [-1.0, float("nan"), float("inf")])
def test_a_cv_must_be_a_number_of_at_least_0(cv: float) -> None:
    with pytest.raises(ValueError, match=r"^cv: must be at least 0"):
        with_gamma_arrivals(make_lengths(2), 1.0, cv, seed=0)


def test_a_sample_without_arrivals_takes_none_twice_and_is_not_a_window() -> None:
    chosen = sampled(make_lengths(1000), 100, seed=4).num_prompt_tokens
    assert len(set(chosen.tolist())) == 100
    assert chosen.max() - chosen.min() > 500
    assert chosen.tolist() == sampled(make_lengths(1000), 100, seed=4).num_prompt_tokens.tolist()


@given(st.integers(1, 30), st.integers(0, 100))
def test_a_sample_with_arrivals_is_a_window(num_requests: int, seed: int) -> None:
    trace = make_trace([float(gap) for gap in range(1, 30)])
    window = sampled(trace, num_requests, seed)
    first = int(window.num_prompt_tokens[0])
    assert window.num_prompt_tokens.tolist() == list(range(first, first + num_requests))
    expected = trace.arrival_seconds[first - 1 : first - 1 + num_requests]
    np.testing.assert_allclose(window.arrival_seconds, expected - expected[0])


@pytest.mark.parametrize("num_requests", [0, 4])
def test_a_sample_is_not_larger_than_its_source(num_requests: int) -> None:
    with pytest.raises(ValueError, match=r"^num_requests: must be in \[1, 3\].*numbered"):
        sampled(make_lengths(3), num_requests, seed=0)


def test_longer_requests_are_dropped_and_counted() -> None:
    dropped = clipped(make_trace([1.0, 2.0, 3.0]), 9, "drop")  # prompts 1 to 4, outputs 7
    assert dropped.num_prompt_tokens.tolist() == [1, 2]
    assert dropped.note == "2 of 4 requests over 9 tokens dropped"


def test_dropping_the_first_request_starts_the_clock_with_the_next() -> None:
    trace = Trace("t", [0.0, 2.0, 3.0], [9, 1, 1], [1, 1, 1], ("",) * 3, [0] * 3)  # type: ignore[arg-type]
    assert clipped(trace, 5, "drop").arrival_seconds.tolist() == [0.0, 1.0]


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1), st.integers(2, 60))
def test_cut_requests_fit_and_others_stay(pairs: list[tuple[int, int]], limit: int) -> None:
    prompts, outputs = np.array(pairs).T
    cut = clipped(Lengths("pairs", prompts, outputs), limit, "cut")
    totals = cut.num_prompt_tokens + cut.num_output_tokens
    over = prompts + outputs > limit
    assert (totals[over] == limit).all()
    assert cut.num_prompt_tokens[~over].tolist() == prompts[~over].tolist()
    assert cut.num_output_tokens[outputs < limit].tolist() == outputs[outputs < limit].tolist()


def test_cut_outputs_are_told() -> None:
    cut = clipped(Lengths("pair", np.array([5, 5]), np.array([20, 6])), 10, "cut")
    assert cut.num_prompt_tokens.tolist() == [1, 4]
    assert cut.num_output_tokens.tolist() == [9, 6]
    assert cut.note == "2 of 2 requests over 10 tokens: prompts cut, 1 outputs too"


def test_requests_within_the_context_are_left_alone() -> None:
    lengths = make_lengths(3)
    assert clipped(lengths, 10, "drop") is lengths


def test_a_context_must_hold_something() -> None:
    with pytest.raises(ValueError, match=r"^max_total_tokens: must be at least 2"):
        clipped(make_lengths(3), 1, "cut")
    with pytest.raises(ValueError, match=r"^max_total_tokens: every request of numbered"):
        clipped(make_lengths(3), 5, "drop")
