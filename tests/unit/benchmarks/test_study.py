"""What the study derives from its runs, and where it stops running."""

from __future__ import annotations

import pytest
from aptserve.evaluation import Bound, RunReport
from support.evaluation import make_run

from benchmarks.study import runs
from benchmarks.study.cells import KV_ONLY, cell


def test_goodput_is_where_the_mean_over_seeds_crosses_the_target() -> None:
    shares = {1.0: (10, 10), 2.0: (9, 7), 3.0: (5, 3)}
    found = runs.goodputs_of(
        make_run(num_good=good, rate=rate, seed=seed)
        for rate, goods in shares.items()
        for seed, good in enumerate(goods)
    )
    by_target = {goodput.target: goodput for goodput in found}
    assert by_target[0.9].rate == pytest.approx(1.5)
    assert by_target[0.7].rate == pytest.approx(2.25)
    assert by_target[0.5].rate == pytest.approx(2.75)
    assert by_target[0.9].seed_rates == pytest.approx((2.0, 4 / 3))
    assert all(goodput.bound is Bound.FOUND for goodput in found)


@pytest.mark.parametrize(("num_good", "bound"), [(10, Bound.AT_LEAST), (2, Bound.BELOW)])
def test_a_goodput_outside_the_rates_is_not_made_up(num_good: int, bound: Bound) -> None:
    found = runs.goodputs_of([make_run(num_good=num_good, rate=rate) for rate in (1.0, 2.0)])
    assert {goodput.bound for goodput in found} == {bound}


def test_rates_go_up_until_half_miss_and_down_until_nearly_all_are_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run_cell(_spec: object, rate: float, seed: int, *, keep_timeline: bool) -> RunReport:
        del keep_timeline
        return make_run(num_good=max(0, round(10 - 2 * rate)), rate=rate, seed=seed)

    monkeypatch.setattr(runs, "run_cell", run_cell)
    spec = cell("sharegpt", 1.0, "fcfs", KV_ONLY, 10)
    found = runs.around_goodput(spec, (0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0), 3, (0, 1))
    assert sorted({run.rate for run in found if run.rate}) == [0.5, 1.0, 2.0, 3.0]
    assert len(found) == 8
