"""What a run's records add up to."""

import pytest
from aptserve.evaluation import Percentiles, PoolTimeline, report_of
from support.evaluation import CELL, TIMELINE, make_record, make_run

RECORDS = [
    make_record(arrival_seconds=0.0),
    make_record(arrival_seconds=1.0, ttft_seconds=4.0, longest_wait_seconds=4.0),
    make_record(arrival_seconds=2.0, tbt_p99_seconds=1.5, num_preemptions=2),
    make_record(
        arrival_seconds=4.0,
        ttft_seconds=None,
        tbt_p99_seconds=None,
        num_output_tokens=0,
        completed=False,
        error="lost",
        longest_wait_seconds=9.0,
    ),
]


def test_shares_are_of_all_that_was_offered() -> None:
    run = report_of(CELL, RECORDS, rate=1.0, seed=0, duration_seconds=8.0)
    assert (run.num_offered, run.num_completed, run.num_good) == (4, 3, 1)
    assert run.attainment == 0.25
    assert run.ttft_attainment == 0.5
    # A request that failed without a gap between tokens has not met its TBT.
    assert run.tbt_attainment == 0.5
    assert run.completed_share == 0.75


def test_rates_waits_and_the_ttft_of_misses() -> None:
    run = report_of(CELL, RECORDS, rate=1.0, seed=0, duration_seconds=8.0)
    assert run.offered_rate == 0.75
    assert run.output_tokens_per_second == 6 / 8
    assert run.requests_per_second == 3 / 8
    assert run.missed_ttft_seconds == Percentiles(1.0, 4.0, 4.0)
    assert run.num_without_token == 1
    assert run.longest_wait_seconds == 9.0
    assert run.num_preemptions == 2


def test_without_a_miss_or_a_token_there_is_no_ttft_to_tell() -> None:
    assert make_run(num_good=10).missed_ttft_seconds is None
    run = report_of(CELL, RECORDS[3:], rate=1.0, seed=0, duration_seconds=0.0)
    assert run.ttft_seconds is None
    assert run.offered_rate is None
    assert run.output_tokens_per_second == 0.0


def test_no_records_are_no_run() -> None:
    with pytest.raises(ValueError, match="records"):
        report_of(CELL, [], rate=1.0, seed=0, duration_seconds=1.0)


def test_tier_shares_are_weighed_by_time() -> None:
    run = make_run(timeline=TIMELINE)
    assert run.tier_shares == pytest.approx({"kv": (8 + 3 * 4) / 40, "hidden": 3 * 2 / 40})


def test_a_timeline_is_kept_only_if_wanted_and_thinned() -> None:
    long = PoolTimeline(
        seconds=tuple(i / 10 for i in range(1001)),
        num_waiting=(0,) * 1001,
        num_running=tuple(range(1001)),
        num_units=1,
        used_units={},
    )
    kept = make_run(timeline=long).timeline
    assert kept is not None
    assert len(kept.seconds) == 200
    assert (kept.seconds[0], kept.seconds[-1]) == (0.0, 100.0)
    assert kept.num_running[-1] == 1000
    arguments = {"rate": 1.0, "seed": 0, "duration_seconds": 1.0, "timeline": long}
    assert report_of(CELL, RECORDS, **arguments).timeline is None  # type: ignore[arg-type]


def test_series_of_a_timeline_have_one_length() -> None:
    with pytest.raises(ValueError, match="timeline"):
        PoolTimeline((0.0, 1.0), (0,), (0, 0), 1, {})


def test_an_instant_has_shares_too() -> None:
    instant = PoolTimeline((0.0,), (0,), (1,), 4, {"kv": (3,)})
    assert instant.mean_shares() == {"kv": 0.75}
