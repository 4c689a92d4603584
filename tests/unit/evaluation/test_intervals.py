"""Intervals against values from tables."""

import pytest
from aptserve.evaluation import Evaluation, estimate, wilson_interval
from support.evaluation import make_run


def test_the_half_width_is_students() -> None:
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    # t(0.975, 4) = 2.776445; s = sqrt(2.5); n = 5
    assert found.half_width == pytest.approx(2.776445 * (2.5 / 5) ** 0.5, rel=1e-6)
    assert (found.mean, found.num_seeds) == (3.0, 5)
    assert found.high - found.mean == pytest.approx(found.mean - found.low)


def test_one_seed_gives_no_interval() -> None:
    found = estimate([2.0])
    assert (found.half_width, found.low, found.high) == (None, 2.0, 2.0)


def test_nothing_has_no_mean() -> None:
    with pytest.raises(ValueError, match="values"):
        estimate([])


def test_wilson_interval() -> None:
    # Worked out by hand for z = 1.959964: (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    assert wilson_interval(9, 10) == pytest.approx((0.595850, 0.982124), abs=1e-5)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-5)
    assert wilson_interval(10, 10)[1] == 1.0
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="num_good"):
        wilson_interval(2, 1)


def test_a_summary_is_over_the_seeds_of_a_rate() -> None:
    runs = [make_run(num_good=good, seed=seed) for seed, good in enumerate((8, 9, 10))]
    (at_one, at_two) = Evaluation((*runs, make_run(rate=2.0))).summaries()
    assert at_one.attainment.mean == pytest.approx(0.9)
    assert at_one.attainment_range == pytest.approx((0.9 - 0.2484, 1.0), abs=1e-4)
    assert at_two.attainment_range == wilson_interval(9, 10)


def test_what_only_some_runs_know_is_averaged_over_those() -> None:
    (summary,) = Evaluation((make_run(num_good=10), make_run(seed=1))).summaries()
    worst = summary.of_known(lambda run: run.missed_ttft_seconds and run.missed_ttft_seconds.max)
    assert worst is not None
    assert (worst.mean, worst.num_seeds) == (3.0, 1)
    assert summary.of_known(lambda run: run.num_steps) is None
