"""Runs a cell at as many rates as its goodputs need, and derives these."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from statistics import fmean

from aptserve.evaluation import (
    Bound,
    Evaluation,
    FoundRate,
    Goodput,
    RunReport,
    crossing,
    goodput_of,
)
from aptserve_scheduler.sim.runs import CellSpec, run_cell

TARGETS = (0.9, 0.7, 0.5)


def around_goodput(
    spec: CellSpec, rates: Sequence[float], start: int, seeds: Sequence[int]
) -> list[RunReport]:
    """All seeds at rates from ``start`` up until half the requests miss, and down until 90 % are
    good. The same seeds, so the same requests, for every cell of a workload."""
    runs: list[RunReport] = []

    def attainment(number: int) -> float:
        keeps = spec.keeps_timeline and number == start
        new = [
            run_cell(spec, rates[number], seed, keep_timeline=keeps and seed == seeds[0])
            for seed in seeds
        ]
        runs.extend(new)
        return fmean(run.attainment for run in new)

    share = lowest = attainment(start)
    for number in range(start + 1, len(rates)):
        if share < min(TARGETS):
            break
        share = attainment(number)
    for number in range(start - 1, -1, -1):
        if lowest >= max(TARGETS):
            break
        lowest = attainment(number)
    return runs


def at_rates(spec: CellSpec, rates: Sequence[float], seeds: Sequence[int]) -> list[RunReport]:
    """All seeds at all of some rates."""
    return [run_cell(spec, rate, seed) for rate in rates for seed in seeds]


def in_processes(
    jobs: Iterable[partial[list[RunReport]]],
    num_processes: int,
    on_done: Callable[[list[RunReport]], None],
) -> None:
    """Run them all; ``on_done`` gets the runs of each as it ends."""
    with ProcessPoolExecutor(num_processes) as executor:
        futures = [executor.submit(job) for job in jobs]
        try:
            for future in as_completed(futures):
                on_done(future.result())
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def goodputs_of(runs: Iterable[RunReport]) -> list[Goodput]:
    """Goodput of each cell at each target: where the mean over seeds crosses it, linear between
    the rates that were run."""
    by_cell: dict[object, list[RunReport]] = defaultdict(list)
    for run in runs:
        by_cell[run.cell].append(run)
    return [_goodput(of_cell, target) for of_cell in by_cell.values() for target in TARGETS]


def _goodput(runs: list[RunReport], target: float) -> Goodput:
    by_rate: dict[float, dict[int, float]] = defaultdict(dict)
    for run in runs:
        assert run.rate is not None
        by_rate[run.rate][run.seed] = run.attainment
    mean = {rate: fmean(shares.values()) for rate, shares in by_rate.items()}
    found = crossing(mean, target)
    if found is not None:
        result = FoundRate(target, found, Bound.FOUND, len(mean))
    elif mean[min(mean)] < target:
        result = FoundRate(target, min(mean), Bound.BELOW, len(mean))
    else:
        result = FoundRate(target, max(mean), Bound.AT_LEAST, len(mean))
    seeds = sorted({run.seed for run in runs})
    by_seed = [{rate: shares[seed] for rate, shares in by_rate.items()} for seed in seeds]
    return goodput_of(runs[0].cell, result, by_seed)


def evaluation_of(runs: Iterable[RunReport]) -> Evaluation:
    """Runs with the goodputs that follow from them."""
    runs = tuple(runs)
    return Evaluation(runs=runs, goodputs=tuple(goodputs_of(runs)))
