"""Builders of records, runs and evaluations."""

from __future__ import annotations

from dataclasses import replace

from aptserve.evaluation import Cell, PoolTimeline, RequestRecord, RunReport, report_of

CELL = Cell("sharegpt", "a machine", 1.0, "apt", 1.0, 1.0)
RECORD = RequestRecord(
    request_id="r",
    arrival_seconds=0.0,
    num_prompt_tokens=4,
    num_output_tokens=2,
    ttft_seconds=1.0,
    tbt_p99_seconds=1.0,
    total_seconds=2.0,
    longest_wait_seconds=1.0,
    completed=True,
    error=None,
    ttft_objective_seconds=1.0,
    tbt_objective_seconds=1.0,
    num_preemptions=0,
)
TIMELINE = PoolTimeline(
    seconds=(0.0, 1.0, 4.0),
    num_waiting=(0, 2, 0),
    num_running=(1, 2, 0),
    num_units=10,
    used_units={"kv": (8, 4, 0), "hidden": (0, 2, 0)},
)


def make_record(**changes: object) -> RequestRecord:
    """A request that met both objectives, but for the changes."""
    return replace(RECORD, **changes)  # type: ignore[arg-type]


def make_run(
    *,
    num_good: int = 9,
    num_all: int = 10,
    rate: float = 1.0,
    seed: int = 0,
    policy: str = "apt",
    cv: float | None = 1.0,
    timeline: PoolTimeline | None = None,
) -> RunReport:
    """A run in which the others missed their TTFT."""
    records = [
        make_record(
            request_id=str(i), arrival_seconds=i / rate, ttft_seconds=1.0 if i < num_good else 3.0
        )
        for i in range(num_all)
    ]
    return report_of(
        replace(CELL, policy=policy, cv=cv),
        records,
        rate=rate,
        seed=seed,
        duration_seconds=num_all / rate,
        num_promotions=3,
        timeline=timeline,
        keep_timeline=True,
    )
