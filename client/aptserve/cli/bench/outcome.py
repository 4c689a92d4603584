"""A run against a service, summed up: the report, what else there is to say, the file."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from aptserve import ModelInfo, Status
from aptserve.cli.bench.play import LiveRun
from aptserve.evaluation import (
    Cell,
    Evaluation,
    PoolTimeline,
    RequestRecord,
    RunReport,
    report_of,
)
from aptserve.evaluation.figures import figures_of, one_figure
from aptserve.evaluation.files import to_json
from aptserve.workload import Trace

_LATE_SECONDS = 0.01
"""A request sent later than this after it was due is told of."""


@dataclass(frozen=True, slots=True)
class BenchCase:
    """What was played, and what served it."""

    workload: Mapping[str, Any]
    """Arguments of ``load_workload`` that gave the trace."""
    trace: Trace
    model: ModelInfo
    seed: int
    rate: float
    """Requests per second that were asked for, or the trace's own."""
    cv: float | None
    """Coefficient of variation of the gaps; ``None``: the trace's own arrivals."""


@dataclass(frozen=True, slots=True)
class BenchOutcome:
    """Everything that is known when a run is over."""

    case: BenchCase
    run: LiveRun
    report: RunReport
    status: Status | None
    """Of the service after the run; ``None``: it did not answer any more."""

    def remarks(self) -> Iterator[str]:
        """Lines about what a reader of the report should know."""
        yield from _failures(self.run.records)
        delays = self.run.send_delay_seconds
        num_late = sum(delay > _LATE_SECONDS for delay in delays)
        if num_late:
            yield (
                f"{num_late} of {len(delays)} requests were sent over {_LATE_SECONDS * 1e3:g} ms "
                f"late, by {max(delays) * 1e3:.0f} ms at most: this client was too slow"
            )
        if self.status is None:
            yield "the service did not answer after the run: its workers' speed is not known"

    @property
    def evaluation(self) -> Evaluation:
        """The report as an evaluation of a single run."""
        return Evaluation((self.report,))

    def document(self) -> dict[str, Any]:
        """The file of ``--json``: an evaluation that ``load_evaluation`` reads, and beside it the
        requests and the service. Durations are seconds. ``workload`` has the arguments with which
        ``load_workload`` gives the trace again. ``workers`` is what the simulator reads: every
        :class:`aptserve.WorkerStatus` after the run, the scheduler's estimates included.
        """
        trace, status = self.case.trace, self.status
        evaluation: dict[str, Any] = json.loads(to_json(self.evaluation))
        return evaluation | {
            "workload": self.case.workload,
            "trace": {"name": trace.name, "note": trace.note, "num_requests": len(trace)},
            "model": dataclasses.asdict(self.case.model),
            "send_delay_seconds": self.run.send_delay_seconds,
            "records": [
                {**dataclasses.asdict(record), "is_good": record.is_good}
                for record in self.run.records
            ],
            "service": None if status is None else _without_workers(status),
            "workers": [] if status is None else list(map(dataclasses.asdict, status.workers)),
        }

    def save(self, path: Path) -> None:
        """Write the document; OSError as the file system has it."""
        text = json.dumps(self.document(), default=_enum_value, allow_nan=False, indent=1)
        path.write_text(f"{text}\n", encoding="utf-8")

    def plot(self, path: Path) -> None:
        """Draw the pool by tier and the queue over time, as PNG. Needs matplotlib."""
        path.write_bytes(one_figure(figures_of(self.evaluation)))


def summed_up(
    case: BenchCase,
    run: LiveRun,
    before: Status,
    after: Status | None,
    timeline: PoolTimeline,
) -> BenchOutcome:
    """The outcome of a run; ``before`` and ``after`` are the service's status around it."""
    return BenchOutcome(case, run, _report(case, run, before, after, timeline), after)


def _report(
    case: BenchCase,
    run: LiveRun,
    before: Status,
    after: Status | None,
    timeline: PoolTimeline,
) -> RunReport:
    return report_of(
        Cell(
            workload=case.trace.name,
            system=_system(case.model, before),
            cv=case.cv,
            policy=before.policy,
            ttft_objective_seconds=run.records[0].ttft_objective_seconds,
            tbt_objective_seconds=run.records[0].tbt_objective_seconds,
        ),
        run.records,
        rate=case.rate,
        seed=case.seed,
        duration_seconds=run.duration_seconds,
        num_promotions=_num_promotions(before, after),
        num_steps=_num_steps(before, after),
        timeline=timeline,
        keep_timeline=True,
        note=case.trace.note,
    )


def _system(model: ModelInfo, status: Status) -> str:
    """``opt-125m on 2 x cpu, kv+hidden``."""
    num_of = Counter(worker.device for worker in status.workers)
    devices = ", ".join(f"{n} x {name}" if n > 1 else name for name, n in num_of.items())
    tiers = "+".join(tier.value for tier in model.tiers)
    return f"{model.name} on {devices}, {tiers}"


def _num_promotions(before: Status, after: Status | None) -> int | None:
    """``None`` where the service was started anew in between and counts from 0 again."""
    if after is None or after.uptime_seconds < before.uptime_seconds:
        return None
    return after.totals.num_promotions - before.totals.num_promotions


def _num_steps(before: Status, after: Status | None) -> int | None:
    """``None`` where workers came or went."""
    if after is None:
        return None
    steps = {worker.worker_id: worker.num_steps for worker in before.workers}
    if steps.keys() != {worker.worker_id for worker in after.workers}:
        return None
    gained = [worker.num_steps - steps[worker.worker_id] for worker in after.workers]
    return sum(gained) if min(gained, default=0) >= 0 else None


def _failures(records: Sequence[RequestRecord]) -> Iterator[str]:
    """A line for each kind of error, with one of its messages."""
    messages: dict[str, list[str]] = defaultdict(list)
    for record in records:
        if record.error is not None:
            kind, _, message = record.error.partition(": ")
            messages[kind if message else "incomplete"].append(message or record.error)
    for kind, texts in sorted(messages.items()):
        yield f"{len(texts)} of {len(records)} requests failed, {kind}: {texts[0]}"


def _without_workers(status: Status) -> dict[str, Any]:
    values = dataclasses.asdict(status)
    del values["workers"]
    return values


def _enum_value(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"{type(value).__name__} has no JSON form")
