"""docs/study from its JSON files: tables in its README, and figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean, geometric_mean

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


_RATIOS: tuple[tuple[str, Callable[[_Found, str, float, float], float | None]], ...] = (
    ("`apt` KV only / `fcfs`", lambda f, w, c, t: _ratio(f, w, c, t, ("apt", KV_ONLY), ["fcfs"])),
    (
        "`apt` re-projected / `fcfs`",
        lambda f, w, c, t: _ratio(f, w, c, t, ("apt", REPROJECTED), ["fcfs"]),
    ),
    (
        "`apt` absorbed / `fcfs`",
        lambda f, w, c, t: _ratio(f, w, c, t, ("apt", ABSORBED), ["fcfs"]),
    ),
    (
        "`apt-slo` absorbed / `fcfs`",
        lambda f, w, c, t: _ratio(f, w, c, t, ("apt-slo", ABSORBED), ["fcfs"]),
    ),
    (
        "`apt-slo` absorbed / best of fcfs, chunked, qos, qos:eager",
        lambda f, w, c, t: _ratio(f, w, c, t, ("apt-slo", ABSORBED), list(KV_POLICIES)),
    ),
    (
        "`apt-slo` KV only / best of the same",
        lambda f, w, c, t: _ratio(f, w, c, t, ("apt-slo", KV_ONLY), list(KV_POLICIES)),
    ),
    *(
        (
            f"`apt-slo` / `apt`, {system}",
            lambda f, w, c, t, system=system: _over_apt(f, w, c, t, system),
        )
        for system in SYSTEMS
    ),
)


def _known(found: Goodput | None) -> float | None:
    return found.rate if found is not None and found.bound is Bound.FOUND else None


def _ratio(
    goodputs: _Found, workload: str, cv: float, target: float, who: tuple[str, str], base: list[str]
) -> float | None:
    policy, system = who
    ours = _known(goodputs.get((workload, system, cv, policy, target)))
    others = [_known(goodputs.get((workload, KV_ONLY, cv, name, target))) for name in base]
    known = [rate for rate in others if rate is not None]
    return ours / max(known) if ours and known else None


def _over_apt(
    goodputs: _Found, workload: str, cv: float, target: float, system: str
) -> float | None:
    ours = _known(goodputs.get((workload, system, cv, "apt-slo", target)))
    theirs = _known(goodputs.get((workload, system, cv, "apt", target)))
    return ours / theirs if ours and theirs else None


def _ratio_table(goodputs: _Found) -> str:
    columns = [(workload.name, cv) for workload in WORKLOADS for cv in CVS]
    rows = []
    for target in TARGETS:
        for name, ratio in _RATIOS:
            values = [ratio(goodputs, workload, cv, target) for workload, cv in columns]
            known = [value for value in values if value is not None]
            cells = ["-" if value is None else f"{value:.2f}" for value in values]
            mean = f"{geometric_mean(known):.2f} ({min(known):.2f})" if known else "-"
            rows.append([f"{target:.0%}", name, *cells, mean])
    headers = ["at", "ratio", *(f"{workload}, CV {cv:g}" for workload, cv in columns)]
    return _table(rows, [*headers, "mean (least)"])


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
