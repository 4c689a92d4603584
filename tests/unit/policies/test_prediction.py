"""What the service's history says about answers under way."""

from __future__ import annotations

import numpy as np
import pytest
from aptserve_scheduler.policies.base import Arrival
from aptserve_scheduler.policies.prediction import OutputPredictor, reaching


class History:
    """A predictor and the answers it has seen, one after the other in slot 0."""

    def __init__(self, window: int = 4096, pooling: float = 8.0) -> None:
        self.predictor = OutputPredictor(window, pooling)

    def add(self, *lengths: int, prompt: int = 10, completed: bool = True) -> None:
        for length in lengths:
            self.predictor.arrived(Arrival(0, 0.0, "", 0, prompt, 0, 10_000, None))
            self.predictor.ended(0, length, completed=completed)

    def remaining(self, *produced: int, prompt: int = 10, most: int = 10_000) -> list[float]:
        output = np.array(produced)
        expected = self.predictor.remaining(
            output, np.full_like(output, prompt), np.full_like(output, most)
        )
        return expected.tolist()


def mean_beyond(lengths: list[int], produced: int) -> float:
    """Residual life by its formula, for answers whose prompts are all of one size."""
    longer = [length - produced for length in lengths if length > produced]
    made_up = max(produced, sum(lengths) / len(lengths))
    pooled = (sum(longer) + made_up) / (len(longer) + 1)
    return (sum(longer) + 8 * pooled) / (len(longer) + 8)


def test_without_history_the_most_that_is_allowed() -> None:
    assert History().remaining(0, 5, most=77) == [77.0, 77.0]


def test_the_formula() -> None:
    lengths = [3, 40, 40, 7, 90, 12, 55]
    history = History()
    history.add(*lengths)
    produced = [0, 3, 12, 39, 40, 89, 90, 500]
    assert history.remaining(*produced) == pytest.approx(
        [mean_beyond(lengths, x) for x in produced]
    )


def test_an_answer_that_outlives_all_others_is_expected_to_last_as_long_again() -> None:
    history = History()
    history.add(10, 20, 30)
    assert history.remaining(200) == [200.0]


def test_much_history_of_one_length_is_believed() -> None:
    history = History()
    history.add(*[100] * 500)
    assert history.remaining(0, 60, 99) == pytest.approx([100.0, 40.0, 1.0], rel=0.05)


def test_prompts_of_different_sizes_are_told_apart() -> None:
    history = History()
    history.add(*[10] * 200, prompt=8)
    history.add(*[1000] * 200, prompt=900)
    (short,) = history.remaining(0, prompt=15)
    (long,) = history.remaining(0, prompt=1000)
    (unseen,) = history.remaining(0, prompt=100)
    assert short < 40
    assert long > 950
    assert unseen == pytest.approx(505)


def test_from_one_token_to_the_most_that_is_allowed() -> None:
    history = History()
    history.add(*[50] * 20)
    assert history.remaining(0, most=7) == [7.0]
    assert history.remaining(0, most=0) == [1.0]
    assert min(history.remaining(*range(60))) >= 1.0


def test_only_the_latest_answers_count() -> None:
    history = History(window=10)
    history.add(*[500] * 10)
    history.add(*[20] * 10)
    assert history.predictor.num_answers == 10
    assert history.remaining(0) == [20.0]


def test_aborted_and_empty_answers_teach_nothing() -> None:
    history = History()
    history.add(5, 6, completed=False)
    history.add(0)
    assert history.predictor.num_answers == 0
    assert history.remaining(0, most=9) == [9.0]


def test_a_new_answer_is_learned_after_a_question() -> None:
    history = History()
    history.add(10)
    assert history.remaining(0) == [10.0]
    history.add(70)
    assert history.remaining(0) == pytest.approx([40.0])


@pytest.mark.parametrize(("window", "pooling"), [(0, 1.0), (1, 0.0)])
def test_bad_settings_are_named(window: int, pooling: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        OutputPredictor(window, pooling)


def test_columns_reach_the_slot_asked_for() -> None:
    column = reaching(np.zeros(0, np.int64), 5)
    column[5] = 3
    assert len(column) == 6
    assert reaching(column, 5) is column
    assert reaching(column, 6).tolist() == [0, 0, 0, 0, 0, 3] + [0] * 6
