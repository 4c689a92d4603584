"""The search for the highest rate that meets a target."""

from collections import Counter
from collections.abc import Callable

import pytest
from aptserve.evaluation import (
    Bound,
    FoundRate,
    GoodputSearch,
    SearchLimits,
    crossing,
    find_goodput,
    goodput_of,
)
from hypothesis import given
from hypothesis import strategies as st
from support.evaluation import CELL


def falling(capacity: float) -> Callable[[float], float]:
    """All is good up to the capacity, and a share beyond it."""
    return lambda rate: min(1.0, capacity / rate)


@given(capacity=st.floats(0.01, 1000), target=st.sampled_from([0.5, 0.7, 0.9, 1.0]))
def test_the_answer_is_within_the_tolerance(capacity: float, target: float) -> None:
    found = find_goodput(falling(capacity), target)
    exact = capacity / target
    assert found.bound is Bound.FOUND
    assert exact / 1.02 <= found.rate <= exact
    assert found.num_evaluations <= 20


def test_no_rate_is_evaluated_twice_whatever_the_number_of_targets() -> None:
    asked: Counter[float] = Counter()
    search = GoodputSearch([0.5, 0.9, 0.7])
    while (rate := search.next_rate()) is not None:
        asked[rate] += 1
        search.learn(rate, falling(3.0)(rate))
    assert set(asked.values()) == {1}
    for target in (0.5, 0.7, 0.9):
        found = search.result(target)
        assert found.rate == pytest.approx(3.0 / target, rel=0.02)
        assert found.num_evaluations == sum(asked.values())


def test_what_is_known_already_is_not_asked_for() -> None:
    search = GoodputSearch([0.9])
    search.learn(2.0, 1.0)
    search.learn(2.02, 0.5)
    assert search.next_rate() is None
    assert search.result(0.9).rate == 2.0


@pytest.mark.parametrize(
    ("share", "bound", "rate"), [(1.0, Bound.AT_LEAST, 8.0), (0.0, Bound.BELOW, 0.5)]
)
def test_the_ends_of_the_range_are_said_to_be_such(share: float, bound: Bound, rate: float) -> None:
    limits = SearchLimits(lowest=0.5, highest=8.0)
    found = find_goodput(lambda _: share, 0.9, limits)
    assert (found.bound, found.rate) == (bound, rate)


def test_too_few_evaluations_are_said_to_be_such() -> None:
    found = find_goodput(falling(2.9), 1.0, SearchLimits(max_evaluations=4))
    assert (found.bound, found.rate, found.num_evaluations) == (Bound.COARSE, 2.0, 4)


def test_nothing_is_claimed_beyond_a_failure() -> None:
    search = GoodputSearch([0.9])
    for rate, share in {1.0: 1.0, 2.0: 0.8, 3.0: 1.0}.items():
        search.learn(rate, share)
    assert search.result(0.9).rate == 1.0
    assert search.next_rate() == 1.5


@pytest.mark.parametrize(
    "limits", [{"lowest": 2.0}, {"highest": 0.5}, {"tolerance": 0.0}, {"max_evaluations": 0}]
)
def test_wrong_limits_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"start|tolerance|max_evaluations"):
        SearchLimits(**limits)  # type: ignore[arg-type]


def test_wrong_targets_and_early_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="target"):
        GoodputSearch([1.1])
    with pytest.raises(ValueError, match="evaluated"):
        GoodputSearch([0.9]).result(0.9)


def test_crossings_lie_on_the_line_between_two_rates() -> None:
    assert crossing({1.0: 1.0, 2.0: 0.8, 4.0: 0.9}, 0.9) == pytest.approx(1.5)
    assert crossing({1.0: 0.8, 2.0: 0.7}, 0.9) is None
    assert crossing({1.0: 1.0, 2.0: 0.9}, 0.9) is None
    assert crossing({}, 0.9) is None


def test_the_interval_is_of_the_seeds_own_crossings() -> None:
    found = FoundRate(0.5, 1.5, Bound.FOUND, 3)
    goodput = goodput_of(CELL, found, [{1.0: 1.0, 2.0: 0.0}, {1.0: 1.0, 3.0: 0.0}])
    assert goodput.seed_rates == (1.5, 2.0)
    # t(0.975, 1) = 12.7062; s = 0.5 / sqrt(2); n = 2
    assert goodput.half_width == pytest.approx(12.7062 * 0.25, rel=1e-4)
    unknown = goodput_of(CELL, found, [{1.0: 1.0, 2.0: 0.0}, {1.0: 0.0}])
    assert (unknown.half_width, unknown.seed_rates) == (None, (1.5, None))
