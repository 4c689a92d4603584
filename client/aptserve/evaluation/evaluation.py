"""Runs and searches together, and their summary over seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from aptserve.evaluation.goodput import Goodput
from aptserve.evaluation.intervals import Estimate, estimate
from aptserve.evaluation.report import Cell, RunReport


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All that tables, figures and pages are made of. Order does not matter: it is sorted."""

    runs: tuple[RunReport, ...]
    goodputs: tuple[Goodput, ...] = ()

    def __post_init__(self) -> None:
        runs = sorted(self.runs, key=lambda run: (run.cell.sort_key, run.rate or 0.0, run.seed))
        goodputs = sorted(self.goodputs, key=lambda found: (found.cell.sort_key, -found.target))
        object.__setattr__(self, "runs", tuple(runs))
        object.__setattr__(self, "goodputs", tuple(goodputs))

    def cells(self) -> tuple[Cell, ...]:
        """Every cell once, sorted."""
        found = {run.cell for run in self.runs} | {found.cell for found in self.goodputs}
        return tuple(sorted(found, key=lambda cell: cell.sort_key))

    def summaries(self) -> tuple[Summary, ...]:
        """One for each cell and rate, over its seeds."""
        groups: dict[tuple[Cell, float | None], list[RunReport]] = defaultdict(list)
        for run in self.runs:
            groups[run.cell, run.rate].append(run)
        return tuple(Summary(cell, rate, tuple(runs)) for (cell, rate), runs in groups.items())


@dataclass(frozen=True, slots=True)
class Summary:
    """Runs of one cell at one rate that differ in their seed."""

    cell: Cell
    rate: float | None
    """``None``: the trace's own, which may differ between seeds."""
    runs: tuple[RunReport, ...]

    def of(self, metric: Callable[[RunReport], float]) -> Estimate:
        """Mean and interval of a number that every run has."""
        return estimate([metric(run) for run in self.runs])

    def of_known(self, metric: Callable[[RunReport], float | None]) -> Estimate | None:
        """The same over the runs that have the number; ``None`` when none has."""
        values = [value for run in self.runs if (value := metric(run)) is not None]
        return estimate(values) if values else None

    @property
    def attainment(self) -> Estimate:
        """Share of requests within both objectives."""
        return self.of(lambda run: run.attainment)

    @property
    def attainment_range(self) -> tuple[float, float]:
        """95 % interval of the attainment within [0, 1]; of a single run the Wilson interval."""
        if len(self.runs) == 1:
            return self.runs[0].attainment_interval
        found = self.attainment
        return max(0.0, found.low), min(1.0, found.high)
