"""The cost model learns a worker's true speed and is hard to mislead."""

from __future__ import annotations

import math

import numpy as np
import pytest
from aptserve_scheduler.core import CostCoefficients, Tier
from aptserve_scheduler.core.cost import CostModel, features
from support.scheduler import make_cost, make_request, make_rig

TIERS = (Tier.KV, Tier.HIDDEN)
TRUTH = make_cost(
    base_seconds=2e-3,
    seconds_per_token=2e-5,
    seconds_per_sequence=2e-4,
    seconds_per_attention_pair=4e-9,
    seconds_per_cached_token={Tier.KV: 2e-7, Tier.HIDDEN: 5e-7},
)


def as_array(cost: CostCoefficients) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Coefficients in the order of :func:`features`."""
    return np.array(
        [
            cost.base_seconds,
            cost.seconds_per_token,
            cost.seconds_per_sequence,
            cost.seconds_per_attention_pair,
            *(cost.seconds_per_cached_token[tier] for tier in TIERS),
        ]
    )


def scaled(factor: float) -> CostCoefficients:
    """A calibration that is wrong by a factor everywhere."""
    base, token, sequence, pair, kv, hidden = (as_array(TRUTH) * factor).tolist()
    return CostCoefficients(base, token, sequence, pair, {Tier.KV: kv, Tier.HIDDEN: hidden})


def random_row(rng: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Features of a prefill or of a decode, of sizes small to large."""
    if rng.random() < 0.3:
        size = int(rng.integers(1, 5))
        num_new = rng.integers(2, 2000, size)
        cached = rng.integers(0, 2000, size) * (rng.random(size) < 0.5)
    else:
        size = int(rng.integers(1, 200))
        num_new = np.ones(size, np.int64)
        cached = rng.integers(1, 2000, size)
    tiers = np.where(rng.random(size) < rng.random(), Tier.KV, Tier.HIDDEN).astype(np.int8)
    return features(cached.astype(np.int64), num_new, tiers, TIERS)


def test_features_of_a_mixed_batch() -> None:
    row = features(
        np.array([10, 20, 30, 4]),
        np.array([1, 1, 1, 6]),
        np.array([Tier.KV, Tier.HIDDEN, Tier.KV, Tier.KV], np.int8),
        TIERS,
    )
    # [1, new tokens, sequences, 6 * (4 + 3) pairs, cached of one-token entries by tier]
    assert row.tolist() == [1, 9, 4, 42, 40, 20]


def test_the_start_is_the_workers_own_calibration() -> None:
    model = CostModel(TRUTH, TIERS)
    assert model.coefficients == TRUTH
    row = random_row(np.random.default_rng(0))
    assert model.seconds(row) == pytest.approx(float(row @ as_array(TRUTH)))


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_coefficients_converge_to_the_truth(factor: float) -> None:
    rng = np.random.default_rng(1)
    model = CostModel(scaled(factor), TIERS)
    for _ in range(3000):
        row = random_row(rng)
        model.observe(row, float(row @ as_array(TRUTH)))
    np.testing.assert_allclose(as_array(model.coefficients), as_array(TRUTH), rtol=0.1)


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_predictions_follow_within_two_hundred_noisy_steps(factor: float) -> None:
    rng = np.random.default_rng(2)
    model = CostModel(scaled(factor), TIERS)
    for _ in range(200):
        row = random_row(rng)
        model.observe(row, float(row @ as_array(TRUTH)) * float(rng.uniform(0.9, 1.1)))
    errors = []
    for _ in range(200):
        row = random_row(rng)
        errors.append(model.seconds(row) / float(row @ as_array(TRUTH)) - 1)
    assert float(np.median(np.abs(errors))) < 0.08


def test_a_change_of_speed_is_followed() -> None:
    rng = np.random.default_rng(3)
    model = CostModel(TRUTH, TIERS)
    for factor in (1.0, 1.6):
        for _ in range(600):
            row = random_row(rng)
            model.observe(row, factor * float(row @ as_array(TRUTH)))
    row = random_row(rng)
    assert model.seconds(row) == pytest.approx(1.6 * float(row @ as_array(TRUTH)), rel=0.1)


@pytest.mark.parametrize("factor", [1e-6, 100.0, 1e9])
def test_one_outlier_does_no_harm(factor: float) -> None:
    rng = np.random.default_rng(4)
    model = CostModel(TRUTH, TIERS)
    for _ in range(300):
        row = random_row(rng)
        model.observe(row, float(row @ as_array(TRUTH)))
    row = random_row(rng)
    model.observe(row, factor * float(row @ as_array(TRUTH)))
    for _ in range(50):
        row = random_row(rng)
        assert model.seconds(row) == pytest.approx(float(row @ as_array(TRUTH)), rel=0.2)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_impossible_times_teach_nothing(seconds: float) -> None:
    model = CostModel(TRUTH, TIERS)
    model.observe(random_row(np.random.default_rng(0)), seconds)
    assert model.coefficients == TRUTH


def test_coefficients_are_never_negative_nor_endless() -> None:
    rng = np.random.default_rng(5)
    model = CostModel(TRUTH, TIERS)
    for _ in range(2000):
        model.observe(random_row(rng), float(10 ** rng.uniform(-7, 3)))
        coefficients = as_array(model.coefficients)
        assert np.isfinite(coefficients).all()
        assert (coefficients >= 0).all()


def test_equal_iterations_for_long_leave_the_rest_alone() -> None:
    """What a steady decode does not show must not drift away meanwhile."""
    rng = np.random.default_rng(6)
    model = CostModel(TRUTH, TIERS)
    size = 8
    row = features(
        np.full(size, 500), np.ones(size, np.int64), np.full(size, Tier.KV, np.int8), TIERS
    )
    for _ in range(5000):
        model.observe(row, float(row @ as_array(TRUTH)) * float(rng.uniform(0.9, 1.1)))
    pair = model.coefficients.seconds_per_attention_pair
    hidden = model.coefficients.seconds_per_cached_token[Tier.HIDDEN]
    assert pair == TRUTH.seconds_per_attention_pair
    assert hidden == TRUTH.seconds_per_cached_token[Tier.HIDDEN]


def test_a_calibration_of_zeros_can_be_learned_from() -> None:
    rng = np.random.default_rng(7)
    zeros = CostCoefficients(0.0, 0.0, 0.0, 0.0, {})
    model = CostModel(zeros, TIERS)
    for _ in range(300):
        row = random_row(rng)
        model.observe(row, float(row @ as_array(TRUTH)))
    assert np.isfinite(as_array(model.coefficients)).all()
    assert as_array(model.coefficients).max() > 0


def test_the_scheduler_learns_from_step_results() -> None:
    rig = make_rig()
    start = rig.scheduler.snapshot(0.0).workers[0].cost
    rig.add(make_request(max_tokens=40))
    for _ in range(40):
        rig.plan()
        rig.answer(step_seconds=0.5)
    assert rig.scheduler.snapshot(0.0).workers[0].cost.base_seconds > 2 * start.base_seconds
