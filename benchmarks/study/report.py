"""docs/study from its JSON files: tables in its README, and figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import NamedTuple

from aptserve.evaluation import Bound, Evaluation, Goodput, RunReport, Summary
from aptserve.evaluation.figures import figures_of
from aptserve.evaluation.files import load_evaluation
from tabulate import tabulate

from benchmarks.study.cells import (
    ABSORBED,
    CVS,
    HYBRID_POLICIES,
    KV_ONLY,
    KV_POLICIES,
    REPROJECTED,
    SYSTEMS,
    WORKLOADS,
)
from benchmarks.study.runs import TARGETS

_Found = dict[tuple[str, str, float, str, float], Goodput]
"""By workload, system, CV, policy, target."""


def write(folder: Path) -> None:
    """Replace the tables between the markers of the README; parts without a file keep theirs."""
    readme = folder / "README.md"
    text = readme.read_text()
    parts = {path.stem: load_evaluation(path) for path in sorted(folder.glob("*.json"))}
    goodputs: _Found = {}
    for name, evaluation in parts.items():
        for found in evaluation.goodputs:
            cell = found.cell
            assert cell.cv is not None
            key = (cell.workload, cell.system, cell.cv, cell.policy, found.target)
            goodputs[key] = found
        text = _put(text, f"{name} runs", _size(evaluation))
        _draw(evaluation, folder, name)
    for workload in WORKLOADS:
        if workload.name in parts:
            text = _put(text, f"{workload.name} goodput", _goodput_table(goodputs, workload.name))
    if goodputs:
        text = _put(text, "ratios", _ratio_table(goodputs))
    for name, build in _TABLES.items():
        if name in parts:
            text = _put(text, name, build(parts[name]))
    readme.write_text(text)


def _put(text: str, name: str, content: str) -> str:
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if begin not in text:
        return text
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    return re.sub(pattern, lambda _: f"{begin}\n{content}\n{end}", text, flags=re.DOTALL)


def _size(evaluation: Evaluation) -> str:
    runs = evaluation.runs
    seeds = len({run.seed for run in runs})
    return f"{len(runs):,} runs of {runs[0].num_offered} requests, {seeds} seeds."


def _draw(evaluation: Evaluation, folder: Path, name: str) -> None:
    for number, figure in enumerate(figures_of(evaluation), 1):
        (folder / f"{name}_{number}.png").write_bytes(figure.png())


def _table(rows: Iterable[list[str]], headers: list[str]) -> str:
    return str(tabulate(list(rows), headers, tablefmt="github", disable_numparse=True))


def _pairs(goodputs: _Found, workload: str) -> list[tuple[str, str]]:
    """System and policy of each row: as in the factorial, variants last."""
    pairs = [(KV_ONLY, policy) for policy in KV_POLICIES]
    pairs += [(system, policy) for system in SYSTEMS for policy in HYBRID_POLICIES]
    found = {(system, policy) for name, system, _, policy, _ in goodputs if name == workload}
    return [pair for pair in pairs if pair in found] + sorted(found - set(pairs))


def _rate(found: Goodput | None) -> str:
    if found is None:
        return ""
    if found.bound is Bound.BELOW:
        return f"< {found.rate:.2g}"
    if found.bound is Bound.AT_LEAST:
        return f">= {found.rate:.2g}"
    width = "" if found.half_width is None else f" ± {found.half_width:.2g}"
    return f"{found.rate:.2f}{width}"


def _goodput_table(goodputs: _Found, workload: str) -> str:
    columns = [(cv, target) for target in TARGETS for cv in CVS]
    rows = [
        [f"`{policy}`", system]
        + [_rate(goodputs.get((workload, system, cv, policy, target))) for cv, target in columns]
        for system, policy in _pairs(goodputs, workload)
    ]
    headers = ["policy", "system", *(f"{target:.0%}, CV {cv:g}" for cv, target in columns)]
    return _table(rows, headers)


@dataclass(frozen=True, slots=True)
class _Ratio:
    """Our goodput over that of the best of some others, which run on KV only unless told."""

    policy: str
    system: str
    others: tuple[str, ...]
    others_name: str
    others_system: str = KV_ONLY

    @property
    def name(self) -> str:
        return f"`{self.policy}`, {self.system} / {self.others_name}"

    def of(self, goodputs: _Found, workload: str, cv: float, target: float) -> _Value | None:
        ours = goodputs.get((workload, self.system, cv, self.policy, target))
        theirs = [
            goodputs.get((workload, self.others_system, cv, name, target)) for name in self.others
        ]
        known = [found for found in theirs if found is not None]
        if ours is None or ours.bound is Bound.BELOW or not known:
            return None
        best = max(known, key=lambda found: found.rate)
        if best.bound is Bound.AT_LEAST:
            return None
        is_floor = ours.bound is Bound.AT_LEAST or best.bound is Bound.BELOW
        return _Value(ours.rate / best.rate, is_floor)


class _Value(NamedTuple):
    """A ratio; a floor where one of the two rates is only known to lie beyond those run."""

    value: float
    is_floor: bool


_BEST = (tuple(KV_POLICIES), "best of fcfs, chunked, qos, qos:eager")
_RATIOS = (
    *(_Ratio("apt", system, ("fcfs",), "`fcfs`") for system in SYSTEMS),
    _Ratio("apt-slo", KV_ONLY, *_BEST),
    _Ratio("apt-slo", ABSORBED, *_BEST),
    *(
        _Ratio("apt-slo", system, ("apt",), "`apt` on the same", system)
        for system in (KV_ONLY, REPROJECTED, ABSORBED)
    ),
    _Ratio("apt-slo", ABSORBED, ("apt",), "`apt`, KV only"),
)


def _ratio_table(goodputs: _Found) -> str:
    columns = [(workload.name, cv) for workload in WORKLOADS for cv in CVS]
    rows = []
    for target in TARGETS:
        for ratio in _RATIOS:
            values = [ratio.of(goodputs, workload, cv, target) for workload, cv in columns]
            known = [found for found in values if found is not None]
            cells = ["-" if found is None else _shown(*found) for found in values]
            if known:
                mean = geometric_mean([found.value for found in known])
                least = min(found.value for found in known)
                summary = f"{_shown(mean, any(f.is_floor for f in known))} ({least:.2f})"
            else:
                summary = "-"
            rows.append([f"{target:.0%}", ratio.name, *cells, summary])
    headers = ["at", "ratio", *(f"{workload}, CV {cv:g}" for workload, cv in columns)]
    return _table(rows, [*headers, "mean (least)"])


def _shown(value: float, is_floor: bool) -> str:
    return f">= {value:.2f}" if is_floor else f"{value:.2f}"


def _overload_table(evaluation: Evaluation) -> str:
    by_cell: dict[object, list[Summary]] = {}
    for summary in evaluation.summaries():
        by_cell.setdefault(summary.cell, []).append(summary)
    rows = []
    for summaries in by_cell.values():
        cell = summaries[0].cell
        row = [f"`{cell.policy}`", cell.system]
        for summary in sorted(summaries, key=lambda summary: summary.rate or 0.0):
            row += [
                f"{summary.rate:.2f}",
                f"{_mean(summary, lambda run: 100 * run.attainment):.0f} %",
                f"{_mean(summary, lambda run: run.longest_wait_seconds):.0f}",
                f"{max(run.longest_wait_seconds for run in summary.runs):.0f}",
                f"{_mean(summary, lambda run: run.duration_seconds):.0f}",
            ]
        rows.append(row)
    figures = ["rate", "good", "longest wait, mean", "worst", "run, s"]
    headers = [f"{figure} at {factor} x" for factor in ("1.5", "2") for figure in figures]
    return _table(rows, ["policy", "system", *headers])


def _mean(summary: Summary, figure: Callable[[RunReport], float]) -> float:
    return fmean(figure(run) for run in summary.runs)


def _attainment_table(evaluation: Evaluation) -> str:
    rows = []
    for summary in evaluation.summaries():
        cell, found = summary.cell, summary.attainment
        width = "" if found.half_width is None else f" ± {100 * found.half_width:.1f}"
        rows.append(
            [
                cell.workload,
                f"{summary.rate:g}",
                f"`{cell.policy}`",
                cell.system,
                f"{100 * found.mean:.1f}{width} %",
                f"{_mean(summary, lambda run: run.longest_wait_seconds):.1f}",
                f"{_mean(summary, lambda run: run.num_preemptions):.0f}",
                f"{_mean(summary, lambda run: run.output_tokens_per_second):.0f}",
                f"{_mean(summary, _drain_share):.2f}",
            ]
        )
    rows.sort(key=lambda row: (row[0], float(row[1])))
    return _table(
        rows,
        [
            "workload",
            "rate",
            "policy",
            "system",
            "good",
            "longest wait, s",
            "preemptions",
            "tokens/s",
            "drain",
        ],
    )


def _drain_share(run: RunReport) -> float:
    """Time from the last arrival to the last end, relative to the time of the arrivals."""
    return run.duration_seconds / run.arrival_span_seconds - 1


_TABLES: dict[str, Callable[[Evaluation], str]] = {
    "overload": _overload_table,
    "no_gain": _attainment_table,
    "long_run": _attainment_table,
    "optimum": _attainment_table,
}
