"""What the comparison of live and simulated runs computes."""

import pytest
from aptserve.types import Calibration, Tier, TierSeconds

from benchmarks.fidelity import stretched, summarise
from benchmarks.live_service import mean_speed


def make_speed(base: float, per_cached: float = 0.0) -> Calibration:
    return Calibration(base, 1.0, 2.0, 3.0, (TierSeconds(Tier.KV, per_cached),))


def make_run(policy: str, seed: int, live: float, simulated: float) -> dict[str, object]:
    def shares(both: float) -> dict[str, float]:
        return {"both": both, "ttft": both, "tbt": 1.0}

    return {
        "policy": policy,
        "times": 1.0,
        "seed": seed,
        "live": shares(live),
        "simulated": shares(simulated),
        "foretold": shares(live),
    }


def test_the_speed_of_a_run_is_the_mean_of_its_estimates() -> None:
    speed = mean_speed([make_speed(1.0, 4.0), make_speed(3.0, 8.0)])
    assert speed == make_speed(2.0, 6.0)


def test_gaps_between_iterations_make_all_of_them_longer() -> None:
    speed = stretched(make_speed(1.0, 4.0), gap_share=0.5)
    assert speed == Calibration(2.0, 2.0, 4.0, 6.0, (TierSeconds(Tier.KV, 8.0),))


def test_differences_cancel_within_a_cell_but_not_in_the_absolute_mean() -> None:
    runs = [
        make_run("apt", 1, live=0.5, simulated=0.6),
        make_run("apt", 2, live=0.5, simulated=0.4),
        make_run("fcfs", 1, live=0.5, simulated=0.54),
    ]
    summary = summarise(runs)
    assert [cell["policy"] for cell in summary["cells"]] == ["fcfs", "apt"]
    assert [cell["points"]["both"] for cell in summary["cells"]] == pytest.approx([4.0, 0.0])
    assert summary["worst_cell_points"] == pytest.approx(4.0)
    assert summary["simulated"]["both"]["mean_absolute_points"] == pytest.approx(8.0)
    assert abs(summary["simulated"]["both"]["worst_points"]) == pytest.approx(10.0)
    assert summary["foretold"]["both"]["mean_points"] == 0.0
    assert summary["simulated"]["tbt"]["mean_absolute_points"] == 0.0
