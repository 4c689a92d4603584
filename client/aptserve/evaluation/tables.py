"""An evaluation as tables of text, for the terminal and for a page alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from aptserve.evaluation.evaluation import Evaluation, Summary
from aptserve.evaluation.goodput import Bound, Goodput
from aptserve.evaluation.intervals import Estimate
from aptserve.evaluation.report import Cell, Percentiles, RunReport

NONE = "-"
_BOUNDS = {Bound.FOUND: "", Bound.COARSE: "~ ", Bound.AT_LEAST: "≥ ", Bound.BELOW: "< "}


@dataclass(frozen=True, slots=True)
class TextTable:
    """Cells of text under headings; what all rows share stands in the title."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    num_labels: int = 1
    """Leading columns that say what a row is about; all others are numbers."""


_Labels = list[tuple[str, Callable[[Cell], str]]]
_Column = tuple[str, Callable[[Summary], str]]


def objectives_table(evaluation: Evaluation) -> TextTable:
    """A row for each cell and rate, over its seeds: how many requests were served well."""
    return _summary_table(evaluation, _OBJECTIVES, _interval_notes)


def waiting_table(evaluation: Evaluation) -> TextTable:
    """A row for each cell and rate, over its seeds: what became of the others, and of memory."""
    return _summary_table(evaluation, _WAITING, _waiting_notes)


def detailed_table(evaluation: Evaluation) -> TextTable:
    """Both together, for a wide page, with every interval."""
    return _summary_table(
        evaluation, _DETAILED, lambda found: _interval_notes(found) + _waiting_notes(found)
    )


def _summary_table(
    evaluation: Evaluation,
    columns: list[_Column],
    notes: Callable[[Sequence[Summary]], tuple[str, ...]],
) -> TextTable:
    summaries = evaluation.summaries()
    title, labels = _labels([summary.cell for summary in summaries])
    return TextTable(
        title=title,
        columns=(*(name for name, _ in labels), *(name for name, _ in columns)),
        rows=tuple(
            (*(text(summary.cell) for _, text in labels), *(text(summary) for _, text in columns))
            for summary in summaries
        ),
        notes=notes(summaries),
        num_labels=len(labels),
    )


def goodput_table(evaluation: Evaluation) -> TextTable:
    """A row for each cell that was searched, a column for each target."""
    goodputs = evaluation.goodputs
    cells = list(dict.fromkeys(found.cell for found in goodputs))
    targets = sorted({found.target for found in goodputs}, reverse=True)
    title, labels = _labels(cells)
    by_cell = {(found.cell, found.target): found for found in goodputs}
    return TextTable(
        title=f"Goodput · {title}",
        columns=(*(name for name, _ in labels), *(f"{t:.0%} good req/s" for t in targets)),
        rows=tuple(
            (
                *(text(cell) for _, text in labels),
                *(_goodput(by_cell.get((cell, target))) for target in targets),
            )
            for cell in cells
        ),
        notes=_goodput_notes(goodputs),
        num_labels=len(labels),
    )


def run_table(run: RunReport) -> TextTable:
    """Everything about one run, a line each."""
    return TextTable(
        title=f"{run.cell.workload} · {run.cell.system}",
        columns=("", ""),
        rows=(*_offered_rows(run), *_judged_rows(run), *_served_rows(run)),
        notes=(run.note,) if run.note else (),
    )


def percent(share: float) -> str:
    """``0.9123`` as ``91.2 %``."""
    return f"{share:.1%}".replace("%", " %")


def _offered_rows(run: RunReport) -> list[tuple[str, str]]:
    cell = run.cell
    came = "all at once" if run.offered_rate is None else f"came at {run.offered_rate:.3g}/s"
    cv = "" if cell.cv is None else f", CV {cell.cv:g}"
    rate = "at their own rate" if run.rate is None else f"at {run.rate:.3g}/s"
    return [
        ("policy", cell.policy),
        ("offered", f"{run.num_offered:,} requests {rate}{cv} ({came})"),
        (
            "objectives",
            f"TTFT {cell.ttft_objective_seconds:g} s, P99 TBT {cell.tbt_objective_seconds:g} s",
        ),
    ]


def _judged_rows(run: RunReport) -> list[tuple[str, str]]:
    low, high = run.attainment_interval
    return [
        ("good", f"{percent(run.attainment)} (95 % interval {low:.1%} to {high:.1%})"),
        ("TTFT met", percent(run.ttft_attainment)),
        ("TBT met", percent(run.tbt_attainment)),
        ("completed", f"{percent(run.completed_share)}, {run.num_completed:,} requests"),
        ("without a token", f"{run.num_without_token:,} requests"),
    ]


def _served_rows(run: RunReport) -> list[tuple[str, str]]:
    return [
        (
            "throughput",
            f"{run.output_tokens_per_second:,.0f} output tokens/s, "
            f"{run.requests_per_second:.3g} requests/s over {run.duration_seconds:,.1f} s",
        ),
        ("TTFT, P50 / P99 / max", _seconds(run.ttft_seconds)),
        ("TTFT of misses, P50 / P99 / max", _seconds(run.missed_ttft_seconds)),
        ("longest wait", f"{run.longest_wait_seconds:.3g} s"),
        ("preemptions", f"{run.num_preemptions:,}"),
        ("promotions", NONE if run.num_promotions is None else f"{run.num_promotions:,}"),
        (
            "pool, mean",
            ", ".join(f"{tier} {percent(share)}" for tier, share in run.tier_shares.items())
            or NONE,
        ),
    ]


def _labels(cells: Iterable[Cell]) -> tuple[str, _Labels]:
    """What all cells share, for the title, and the columns of what they do not."""
    cells = list(cells)
    shared, columns = [], []
    for name, text in _LABELS:
        if name != "policy" and len({text(cell) for cell in cells}) == 1:
            shared.append(_TITLES.get(name, text)(cells[0]))
        else:
            columns.append((name, text))
    return " · ".join(shared), columns


_LABELS: _Labels = [
    ("workload", lambda cell: cell.workload),
    ("system", lambda cell: cell.system),
    ("CV", lambda cell: "real" if cell.cv is None else f"{cell.cv:g}"),
    (
        "objectives",
        lambda cell: f"{cell.ttft_objective_seconds:g} / {cell.tbt_objective_seconds:g} s",
    ),
    ("policy", lambda cell: cell.policy),
]
_TITLES: dict[str, Callable[[Cell], str]] = {
    "CV": lambda cell: "the trace's arrivals" if cell.cv is None else f"CV {cell.cv:g}",
    "objectives": lambda cell: (
        f"TTFT / P99 TBT {cell.ttft_objective_seconds:g} / {cell.tbt_objective_seconds:g} s"
    ),
}


def _share(found: Estimate) -> str:
    if found.half_width is None:
        return f"{found.mean:.1%}".rstrip("%")
    return f"{found.mean * 100:.1f} ± {found.half_width * 100:.1f}"


def _number(found: Estimate | None, digits: int = 3) -> str:
    if found is None:
        return NONE
    return f"{found.mean:,.0f}" if found.mean >= 10**digits else f"{found.mean:.{digits}g}"


def _with_interval(found: Estimate | None) -> str:
    if found is None or found.half_width is None:
        return _number(found)
    return f"{_number(found)} ± {found.half_width:.2g}"


def _seconds(found: Percentiles | None) -> str:
    return NONE if found is None else f"{found.p50:.3g} / {found.p99:.3g} / {found.max:.3g} s"


def _missed_ttft(metric: Callable[[Percentiles], float]) -> Callable[[Summary], str]:
    def text(summary: Summary) -> str:
        return _number(
            summary.of_known(
                lambda run: None if (missed := run.missed_ttft_seconds) is None else metric(missed)
            )
        )

    return text


def _worst_ttft(summary: Summary) -> str:
    known = [missed.max for run in summary.runs if (missed := run.missed_ttft_seconds)]
    return f"{max(known):.3g}" if known else NONE


def _longest_wait(summary: Summary) -> str:
    return f"{max(run.longest_wait_seconds for run in summary.runs):.3g}"


def _tiers(summary: Summary) -> str:
    tiers = dict.fromkeys(tier for run in summary.runs for tier in run.tier_shares)
    means = (summary.of(lambda run, tier=tier: run.tier_shares.get(tier, 0.0)) for tier in tiers)  # type: ignore[misc]
    return " / ".join(f"{mean.mean * 100:.0f}" for mean in means) or NONE


_RATE: _Column = ("rate /s", lambda s: "own" if s.rate is None else f"{s.rate:.3g}")
_GOOD: _Column = ("good %", lambda summary: _share(summary.attainment))
_MISSES: list[_Column] = [
    ("TTFT of misses P50 s", _missed_ttft(lambda missed: missed.p50)),
    ("P99 s", _missed_ttft(lambda missed: missed.p99)),
    ("max s", _worst_ttft),
    ("longest wait s", _longest_wait),
]
_POOL: _Column = ("pool % by tier", _tiers)
_OBJECTIVES: list[_Column] = [
    _RATE,
    _GOOD,
    ("TTFT met %", lambda s: f"{s.of(lambda run: run.ttft_attainment).mean * 100:.1f}"),
    ("TBT met %", lambda s: f"{s.of(lambda run: run.tbt_attainment).mean * 100:.1f}"),
    ("done %", lambda s: f"{s.of(lambda run: run.completed_share).mean * 100:.1f}"),
    ("tokens /s", lambda s: _number(s.of(lambda run: run.output_tokens_per_second))),
    ("done /s", lambda s: _number(s.of(lambda run: run.requests_per_second))),
]
_WAITING: list[_Column] = [
    _RATE,
    *_MISSES,
    ("preemp- tions", lambda s: _number(s.of(lambda run: run.num_preemptions))),
    ("promo- tions", lambda s: _number(s.of_known(lambda run: run.num_promotions))),
    _POOL,
]
_DETAILED: list[_Column] = [
    _RATE,
    ("seeds", lambda s: str(len(s.runs))),
    _GOOD,
    ("TTFT met %", lambda s: _share(s.of(lambda run: run.ttft_attainment))),
    ("TBT met %", lambda s: _share(s.of(lambda run: run.tbt_attainment))),
    ("completed %", lambda s: _share(s.of(lambda run: run.completed_share))),
    ("output tokens/s", lambda s: _with_interval(s.of(lambda run: run.output_tokens_per_second))),
    ("completed/s", lambda s: _with_interval(s.of(lambda run: run.requests_per_second))),
    *_MISSES,
    ("preemptions", lambda s: _with_interval(s.of(lambda run: run.num_preemptions))),
    ("promotions", lambda s: _with_interval(s.of_known(lambda run: run.num_promotions))),
    _POOL,
]


def _interval_notes(summaries: Sequence[Summary]) -> tuple[str, ...]:
    counts = sorted({len(summary.runs) for summary in summaries})
    if not counts or counts[-1] == 1:
        return ("one seed: no interval",)
    return (f"± 95 % confidence interval over {' to '.join(map(str, counts))} seeds",)


def _waiting_notes(summaries: Sequence[Summary]) -> tuple[str, ...]:
    tiers = list(dict.fromkeys(t for s in summaries for run in s.runs for t in run.tier_shares))
    notes = ("max and longest wait: the worst over seeds; all else: means",)
    return (*notes, f"tiers: {' / '.join(tiers)}") if tiers else notes


def _goodput(found: Goodput | None) -> str:
    if found is None:
        return NONE
    interval = "" if found.half_width is None else f" ± {found.half_width:.2g}"
    return f"{_BOUNDS[found.bound]}{found.rate:.3g}{interval}"


def _goodput_notes(goodputs: Iterable[Goodput]) -> tuple[str, ...]:
    explained = {
        Bound.COARSE: "~ evaluations ran out before the tolerance was reached",
        Bound.AT_LEAST: "≥ the highest rate tried still meets the target",
        Bound.BELOW: "< the lowest rate tried does not meet the target",
    }
    goodputs = list(goodputs)
    notes = [text for bound, text in explained.items() if any(g.bound is bound for g in goodputs)]
    if any(found.half_width is not None for found in goodputs):
        notes.insert(0, "± 95 % confidence interval over seeds")
    return tuple(notes)
