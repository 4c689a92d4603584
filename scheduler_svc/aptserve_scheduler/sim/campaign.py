"""Many simulations: grids of rates and searches for the goodput, over seeds, on many processes."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean

from aptserve.evaluation import (
    Evaluation,
    Goodput,
    GoodputSearch,
    RunReport,
    SearchLimits,
    goodput_of,
)

from aptserve_scheduler.sim.runs import CellSpec, run_cell

_SEED_TOLERANCE = 0.1
"""Of the search in each seed alone, between whose last two rates is interpolated."""
_Job = Callable[[], RunReport]
_USUAL_EVALUATIONS = 14
"""Rates that a search usually needs; only for how much work is said to be left."""


@dataclass(frozen=True, slots=True)
class Campaign:
    """What to find out about every one of some cells. ValueError when that is nothing."""

    cells: tuple[CellSpec, ...]
    seeds: tuple[int, ...]
    rates: tuple[float | None, ...] = ()
    """To run at; ``None`` stands for the trace's own rate."""
    targets: tuple[float, ...] = ()
    """Attainments whose goodput to search."""
    limits: SearchLimits = field(default_factory=SearchLimits)

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("seeds: at least one is needed")
        if not self.rates and not self.targets:
            raise ValueError("rates: a rate to run at or a target to search for is needed")


def evaluate(
    campaign: Campaign,
    *,
    num_processes: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Run a campaign, by default on all cores; equal for equal campaigns however many there are.

    ``on_progress`` is told, at the end of each run, how many are done and how many are expected in
    all, which is an estimate as long as searches go on. Whatever ends this early, Ctrl-C too, ends
    the processes at once. :class:`BrokenProcessPool` when one of them dies.
    """
    num_processes = num_processes or os.cpu_count() or 1
    states = [_CellState(spec, campaign) for spec in campaign.cells]
    queue = deque((state, rate, seed) for state in states for rate, seed in state.next_runs())
    running: dict[Future[RunReport], _CellState] = {}
    # One job more for each process than it runs, so that none waits for its next.
    most_running = 2 * num_processes if num_processes > 1 else 1
    num_done = 0
    with _submitting(num_processes) as submit:
        while queue or running:
            while queue and len(running) < most_running:
                state, rate, seed = queue.popleft()
                running[submit(state.job(rate, seed))] = state
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                state = running.pop(future)
                state.take(future.result())
                queue.extend((state, rate, seed) for rate, seed in state.next_runs())
                num_done += 1
                num_left = sum(state.num_expected for state in states) + len(queue) + len(running)
                if on_progress is not None:
                    on_progress(num_done, num_done + num_left)
    return Evaluation(
        runs=tuple(run for state in states for run in state.complete_runs()),
        goodputs=tuple(found for state in states for found in state.goodputs()),
    )


@dataclass(slots=True)
class _CellState:
    """How far a cell has come: first the grid; then the search, a rate with all seeds at a time;
    then a coarser one in each seed, whose runs are not reported.
    """

    spec: CellSpec
    campaign: Campaign
    runs: list[RunReport] = field(default_factory=list)
    _search: GoodputSearch | None = None
    _seed_searches: dict[int, GoodputSearch] = field(default_factory=dict)
    _num_pending: int = 0
    _attainments: dict[float | None, dict[int, float]] = field(
        default_factory=lambda: defaultdict(dict)
    )

    def job(self, rate: float | None, seed: int) -> _Job:
        """One run, to be called in any process."""
        rates = self.campaign.rates
        keeps = self.spec.keeps_timeline and seed == self.campaign.seeds[0] and len(rates) > 0
        keeps = keeps and rate == rates[len(rates) // 2]
        return partial(run_cell, self.spec, rate, seed, keep_timeline=keeps)

    def next_runs(self) -> list[tuple[float | None, int]]:
        """Rates and seeds that can start now, none while others of the cell are under way."""
        if self._num_pending:
            return []
        runs: list[tuple[float | None, int]] = []
        if not self.runs:
            runs = self._with_all_seeds(tuple(dict.fromkeys(self.campaign.rates)))
        if not runs and self.campaign.targets:
            rate = None if self._seed_searches else self._next_search_rate()
            runs = self._next_seed_runs() if rate is None else self._with_all_seeds((rate,))
        self._num_pending = len(runs)
        return runs

    def take(self, run: RunReport) -> None:
        """Enter the end of a run."""
        self._num_pending -= 1
        self.runs.append(run)
        self._attainments[run.rate][run.seed] = run.attainment

    @property
    def num_expected(self) -> int:
        """Runs that the search is likely to ask for beyond those under way."""
        if not self.campaign.targets or not self._num_pending or self._seed_searches:
            return 0
        left = _USUAL_EVALUATIONS - len(self._attainments) - 1
        return max(0, left) * len(self.campaign.seeds)

    def complete_runs(self) -> list[RunReport]:
        """Runs at the rates that all seeds have in common."""
        return [run for run in self.runs if self._is_complete(run.rate)]

    def goodputs(self) -> list[Goodput]:
        """What the search found, if there was one."""
        if self._search is None:
            return []
        by_seed = [self._of_seed(seed) for seed in self.campaign.seeds]
        found = [self._search.result(target) for target in self.campaign.targets]
        return [goodput_of(self.spec.cell(), result, by_seed) for result in found]

    def _with_all_seeds(self, rates: tuple[float | None, ...]) -> list[tuple[float | None, int]]:
        return [(rate, seed) for rate in rates for seed in self.campaign.seeds]

    def _next_search_rate(self) -> float | None:
        """The search over the mean of all seeds."""
        if self._search is None:
            self._search = GoodputSearch(self.campaign.targets, self.campaign.limits)
        for rate, of_seed in self._attainments.items():
            if rate is not None:
                self._search.learn(rate, fmean(of_seed.values()))
        return self._search.next_rate()

    def _next_seed_runs(self) -> list[tuple[float | None, int]]:
        """A search in each seed, after that, for the spread: bursts move some far from the mean."""
        if len(self.campaign.seeds) == 1:
            return []
        runs: list[tuple[float | None, int]] = []
        limits = self.campaign.limits
        limits = dataclasses.replace(limits, tolerance=max(limits.tolerance, _SEED_TOLERANCE))
        for seed in self.campaign.seeds:
            search = self._seed_searches.setdefault(
                seed, GoodputSearch(self.campaign.targets, limits)
            )
            for rate, attainment in self._of_seed(seed).items():
                search.learn(rate, attainment)
            if (wanted := search.next_rate()) is not None:
                runs.append((wanted, seed))
        return runs

    def _of_seed(self, seed: int) -> dict[float, float]:
        return {
            rate: shares[seed]
            for rate, shares in self._attainments.items()
            if rate is not None and seed in shares
        }

    def _is_complete(self, rate: float | None) -> bool:
        return len(self._attainments[rate]) == len(self.campaign.seeds)


@contextlib.contextmanager
def _submitting(num_processes: int) -> Iterator[Callable[[_Job], Future[RunReport]]]:
    """Runs jobs in processes; one alone means here, when it is submitted."""
    if num_processes == 1:
        yield _run_here
        return
    others = set(multiprocessing.active_children())
    # A fork would copy the threads' locks of gRPC and of a progress bar in whatever state they are.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(num_processes, mp_context=context)
    try:
        yield partial(_submit, executor)
    except BaseException:
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _submit(executor: Executor, job: _Job) -> Future[RunReport]:
    # A process started here inherits the mask: Ctrl-C, which a terminal sends to all, is for the
    # parent alone, where it is delivered at the end of this block.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return executor.submit(job)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _run_here(job: _Job) -> Future[RunReport]:
    future: Future[RunReport] = Future()
    future.set_result(job())
    return future
