"""The closing table, and a sentence that is true whoever won."""

import dataclasses

import pytest
from aptserve.cli.demo.report import Outcome, closing_sentence, closing_table, summarise
from aptserve.evaluation import RequestRecord
from aptserve.types import Totals
from rich.console import Console


def make_outcome(**changes: object) -> Outcome:
    outcome = Outcome(
        policy="fcfs",
        num_requests=100,
        num_met=20,
        num_ttft_met=30,
        num_tbt_met=90,
        num_completed=100,
        ttft_p50_seconds=1.5,
        ttft_p99_seconds=5.0,
        longest_wait_seconds=6.0,
        tokens_per_second=500.0,
        duration_seconds=20.0,
        num_preemptions=4,
        num_promotions=0,
    )
    return dataclasses.replace(outcome, **changes)  # type: ignore[arg-type]


def make_record(ttft: float | None, **changes: object) -> RequestRecord:
    record = RequestRecord(
        request_id="r",
        arrival_seconds=0.0,
        num_prompt_tokens=10,
        num_output_tokens=0 if ttft is None else 20,
        ttft_seconds=ttft,
        tbt_p99_seconds=0.1,
        total_seconds=3.0,
        longest_wait_seconds=3.0 if ttft is None else ttft,
        completed=ttft is not None,
        error=None if ttft is not None else "DEADLINE_EXCEEDED",
        ttft_objective_seconds=1.0,
        tbt_objective_seconds=0.2,
        num_preemptions=0,
    )
    return dataclasses.replace(record, **changes)  # type: ignore[arg-type]


NO_TOTALS = Totals(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def test_summary() -> None:
    records = [make_record(0.5), make_record(2.0), make_record(0.7, tbt_p99_seconds=0.3)]
    before = dataclasses.replace(NO_TOTALS, num_preemptions=1)
    after = dataclasses.replace(NO_TOTALS, num_preemptions=4, num_promotions=2)
    outcome = summarise("fcfs", records, 6.0, before, after)
    assert (outcome.num_requests, outcome.num_met) == (3, 1)
    assert (outcome.num_ttft_met, outcome.num_tbt_met, outcome.num_completed) == (2, 2, 3)
    assert (outcome.ttft_p50_seconds, outcome.ttft_p99_seconds) == (0.7, 2.0)
    assert outcome.longest_wait_seconds == 2.0
    assert outcome.tokens_per_second == 10.0
    assert (outcome.num_preemptions, outcome.num_promotions) == (3, 2)


def test_a_first_token_that_never_came_is_the_longest() -> None:
    outcome = summarise("fcfs", [make_record(None), make_record(0.5)], 3.0, NO_TOTALS, NO_TOTALS)
    assert outcome.ttft_p50_seconds == 0.5
    assert outcome.ttft_p99_seconds is None
    assert outcome.num_completed == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"num_met": 80},
            "With the same model and memory, apt met the objectives of 80 of 100 requests, fcfs of "
            "20 (4.0 times as many).",
        ),
        (
            {"num_met": 80, "longest_wait_seconds": 9.0, "tokens_per_second": 400.0},
            "With the same model and memory, apt met the objectives of 80 of 100 requests, fcfs of "
            "20 (4.0 times as many); the price is a longest wait of 9.0 s instead of 6.0 s and 400 "
            "tokens per second instead of 500.",
        ),
        (
            {"num_met": 22},
            "No clear winner here: apt met the objectives of 22 of 100 requests, fcfs of 20, which "
            "may be chance.",
        ),
        (
            {"num_met": 10},
            "apt did worse than fcfs here: apt met the objectives of 10 of 100 requests, fcfs of "
            "20.",
        ),
    ],
)
def test_the_closing_sentence_is_true(changes: dict[str, object], expected: str) -> None:
    second = make_outcome(policy="apt", **changes)
    assert closing_sentence(make_outcome(), second) == expected


def test_nobody_met_anything_before() -> None:
    sentence = closing_sentence(make_outcome(num_met=0), make_outcome(policy="apt", num_met=50))
    assert sentence.endswith("fcfs of 0.")


def test_the_table_has_both_runs() -> None:
    runs = [make_outcome(), make_outcome(policy="apt", num_met=80, ttft_p99_seconds=None)]
    console = Console(width=100)
    with console.capture() as captured:
        console.print(closing_table(runs))
    lines = captured.get().splitlines()
    header = next(line for line in lines if "fcfs" in line)
    assert "apt" in header
    met = next(line for line in lines if "both objectives met" in line)
    assert "20 of 100 (20%)" in met
    assert "80 of 100 (80%)" in met
    assert "never" in next(line for line in lines if "P99" in line)
