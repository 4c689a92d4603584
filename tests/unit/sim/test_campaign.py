"""Runs that pair over seeds, and campaigns that come out alike however they are carried out."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from aptserve.evaluation import SearchLimits
from aptserve_scheduler.core import Objectives
from aptserve_scheduler.sim import SimWorker
from aptserve_scheduler.sim.campaign import Campaign, evaluate
from aptserve_scheduler.sim.runs import (
    CellSpec,
    largest_request,
    load_trace,
    paper_objectives,
    run_cell,
)
from aptserve_scheduler.sim.worker import Amount
from support.scheduler import make_worker

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FixedCost:
    """A time for each iteration, whatever is in it."""

    step_seconds: float = 0.01

    def seconds(self, num_cached: Ints, num_new: Ints, tiers: npt.NDArray[np.int8]) -> float:
        return self.step_seconds

    def decode_seconds(self, num_sequences: Sequence[int], num_cached: Sequence[Amount]) -> Amount:
        return self.step_seconds


class DeadlyCost(FixedCost):
    """Ends the process that asks."""

    def seconds(self, num_cached: Ints, num_new: Ints, tiers: npt.NDArray[np.int8]) -> float:
        os._exit(1)


WORKER = SimWorker(replace(make_worker("w"), num_units=200, max_num_seqs=2), FixedCost())
LENGTHS = "input_tokens,output_tokens\n" + "".join(f"{8 + i},{2 + i % 5}\n" for i in range(40))
SPEC = CellSpec(
    source="lengths.csv",
    cv=1.0,
    policy="fcfs",
    workers=(WORKER,),
    system="a machine",
    objectives=Objectives(0.05, 0.5),
    num_requests=12,
)
CELLS = (SPEC, replace(SPEC, policy="chunked"))


@pytest.fixture(autouse=True)
def lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace of all cells, where processes find it too."""
    (tmp_path / "lengths.csv").write_text(LENGTHS)
    monkeypatch.chdir(tmp_path)


def test_a_rate_scales_arrivals_and_changes_nothing_else() -> None:
    slow, fast = load_trace(SPEC, 1.0, 3), load_trace(SPEC, 4.0, 3)
    assert np.array_equal(slow.arrival_seconds, fast.arrival_seconds * 4)
    assert np.array_equal(slow.num_prompt_tokens, fast.num_prompt_tokens)
    assert not np.array_equal(slow.num_prompt_tokens, load_trace(SPEC, 1.0, 4).num_prompt_tokens)


@pytest.mark.parametrize("rate", [0.0, float("nan"), None])
def test_a_rate_must_be_one(rate: float | None) -> None:
    with pytest.raises(ValueError, match="rate"):
        load_trace(SPEC, rate, 0)


def test_a_cv_needs_a_rate_where_arrivals_are_real(tmp_path: Path) -> None:
    (tmp_path / "real.csv").write_text("arrival_s,input_tokens,output_tokens\n0,8,2\n2,9,3\n")
    real = replace(SPEC, source="real.csv", num_requests=None)
    assert load_trace(replace(real, cv=None), None, 0).rate == 0.5
    with pytest.raises(ValueError, match="rate: is needed to draw"):
        load_trace(real, None, 0)


def test_a_run_is_reported_under_its_cell() -> None:
    run = run_cell(SPEC, 4.0, 1, keep_timeline=True)
    assert run.cell == SPEC.cell()
    assert (run.rate, run.seed, run.num_offered, run.num_completed) == (4.0, 1, 12, 12)
    assert run.timeline is not None
    assert set(run.tier_shares) == {"kv", "hidden"}
    assert run.note.endswith("played at 4/s")


def test_a_grid_has_every_case_once_and_few_timelines() -> None:
    cells = (replace(SPEC, keeps_timeline=True), CELLS[1])
    evaluation = evaluate(Campaign(cells, (0, 1), (1.0, 2.0, 4.0)), num_processes=1)
    found = [(run.cell.policy, run.rate, run.seed) for run in evaluation.runs]
    assert found == [
        (p, r, s) for p in ("chunked", "fcfs") for r in (1.0, 2.0, 4.0) for s in (0, 1)
    ]
    kept = [(run.cell.policy, run.rate, run.seed) for run in evaluation.runs if run.timeline]
    assert kept == [("fcfs", 2.0, 0)]


def test_a_traces_own_rate_is_one_case_though_seeds_take_other_windows(tmp_path: Path) -> None:
    rows = "".join(f"{i * i},8,2\n" for i in range(30))
    (tmp_path / "real.csv").write_text("arrival_s,input_tokens,output_tokens\n" + rows)
    spec = replace(SPEC, source="real.csv", cv=None)
    evaluation = evaluate(Campaign((spec,), (0, 1), (None,)), num_processes=1)
    (summary,) = evaluation.summaries()
    assert (summary.rate, len(summary.runs)) == (None, 2)
    assert len({run.offered_rate for run in summary.runs}) == 2


def test_a_search_has_an_interval_and_reports_rates_that_all_seeds_share() -> None:
    told: list[tuple[int, int]] = []
    campaign = Campaign(CELLS, (0, 1, 2), targets=(0.9,), limits=SearchLimits(tolerance=0.2))
    evaluation = evaluate(
        campaign, num_processes=1, on_progress=lambda done, all_: told.append((done, all_))
    )
    for found in evaluation.goodputs:
        assert found.half_width is not None
        at_goodput = [
            s for s in evaluation.summaries() if (s.cell, s.rate) == (found.cell, found.rate)
        ]
        assert at_goodput[0].attainment.mean >= 0.9
    assert all(len(summary.runs) == 3 for summary in evaluation.summaries())
    assert told[-1][0] == told[-1][1] == len(told)
    assert all(done <= expected for done, expected in told)


def test_processes_give_what_one_gives() -> None:
    campaign = Campaign(CELLS, (0,), (2.0, 8.0))
    assert evaluate(campaign, num_processes=2) == evaluate(campaign, num_processes=1)


def test_a_process_that_dies_is_noticed() -> None:
    deadly = replace(SPEC, workers=(replace(WORKER, cost=DeadlyCost()),))
    with pytest.raises(BrokenProcessPool):
        evaluate(Campaign((deadly,), (0,), (1.0,)), num_processes=2)


def test_a_campaign_must_have_something_to_find() -> None:
    with pytest.raises(ValueError, match="seeds"):
        Campaign(CELLS, (), (1.0,))
    with pytest.raises(ValueError, match="rates"):
        Campaign(CELLS, (0,))


def test_objectives_are_the_papers_where_it_has_some() -> None:
    assert paper_objectives("longbench", "opt-66b") == Objectives(5.0, 1.0)
    assert paper_objectives("humaneval", "llama-2-7b") == Objectives(0.5, 0.5)
    assert paper_objectives("trace.csv", "opt-13b") == Objectives(1.0, 1.0)


def test_the_largest_request_fits_the_smallest_worker() -> None:
    spec = WORKER.spec
    smaller = replace(WORKER, spec=replace(spec, num_units=spec.num_units // 2))
    expected = spec.num_units // 2 // spec.tiers[0].units_per_block * spec.block_size
    assert largest_request((WORKER, smaller)) == expected


def test_an_interrupt_ends_its_processes_at_once() -> None:
    before = set(multiprocessing.active_children())

    def interrupt(_done: int, _expected: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(Campaign(CELLS, (0, 1), (1.0, 2.0)), num_processes=2, on_progress=interrupt)
    assert set(multiprocessing.active_children()) == before
