"""What ``aptserve bench`` does."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypedDict

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from aptserve import AptServeError, AsyncClient, ModelInfo, Status
from aptserve.cli.bench.observe import PoolObserver
from aptserve.cli.bench.outcome import BenchCase, BenchOutcome, summed_up
from aptserve.cli.bench.play import play_trace
from aptserve.cli.connection import connected
from aptserve.cli.problems import CommandError, usage_error
from aptserve.cli.report_tables import report_view
from aptserve.evaluation import RequestRecord
from aptserve.workload import load_workload, workload_names

_FLAGS = {
    "source": "--trace",
    "rate": "--rate",
    "cv": "--cv",
    "num_requests": "--num-requests",
    "seed": "--seed",
}
_REFRESHES_PER_SECOND = 4
"""Drawing takes time from the loop that sends."""


class _Workload(TypedDict):
    """Arguments of ``load_workload``."""

    source: str
    num_requests: int | None
    seed: int
    max_total_tokens: int
    rate: float | None
    cv: float | None


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to play, how to judge it, and where the results go."""

    source: str
    rate: float | None
    cv: float | None
    num_requests: int | None
    seed: int
    ttft_seconds: float
    tbt_seconds: float
    timeout_seconds: float
    json_path: Path | None
    plot_path: Path | None


def run_bench(options: BenchOptions, *, address: str, api_key: str | None) -> None:
    """Play the trace, print the report, write the files."""
    _check(options)
    with connected(address, api_key) as client:
        model = client.get_model()
        case = _load(options, model)
        outcome = asyncio.run(_play(options, case, address, api_key))
    Console(highlight=False).print(report_view(outcome.report))
    notes = Console(stderr=True, highlight=False)
    for line in outcome.remarks():
        notes.print(line, style="yellow")
    _save(options, outcome)


def _save(options: BenchOptions, outcome: BenchOutcome) -> None:
    try:
        if options.json_path is not None:
            outcome.save(options.json_path)
        if options.plot_path is not None:
            outcome.plot(options.plot_path)
    except OSError as error:
        raise CommandError(f"cannot write {error.filename}: {error.strerror}") from None


def _check(options: BenchOptions) -> None:
    """Refuse before a long run what would fail after it."""
    for flag, seconds in (
        ("--slo-ttft", options.ttft_seconds),
        ("--slo-tbt", options.tbt_seconds),
        ("--timeout", options.timeout_seconds),
    ):
        if not seconds > 0:
            raise usage_error(f"{flag}: must be more than 0")
    for flag, path in (("--json", options.json_path), ("--plot", options.plot_path)):
        if path is not None and not path.absolute().parent.is_dir():
            raise usage_error(f"{flag}: there is no folder {path.absolute().parent}")
    if options.plot_path is not None and find_spec("matplotlib") is None:
        raise usage_error("--plot: needs matplotlib: pip install 'apt-serve[simulate]'")


def _load(options: BenchOptions, model: ModelInfo) -> BenchCase:
    workload: _Workload = {
        "source": options.source,
        "num_requests": options.num_requests,
        "seed": options.seed,
        "max_total_tokens": model.context_length,
        "rate": options.rate,
        "cv": options.cv,
    }
    try:
        trace = load_workload(**workload)
    except ValueError as error:
        field, colon, reason = str(error).partition(":")
        raise usage_error(f"{_FLAGS.get(field, field)}{colon}{reason}") from None
    except OSError as error:
        raise usage_error(
            f"--trace: {error.filename or options.source}: {error.strerror}"
        ) from None
    rate = trace.rate if options.rate is None else options.rate
    if math.isinf(rate):
        raise usage_error(f"--rate: is needed, all requests of {trace.name} arrive at once")
    return BenchCase(workload, trace, model, seed=options.seed, rate=rate, cv=_cv(options))


def _cv(options: BenchOptions) -> float | None:
    """Arrivals that have to be made up are a Poisson process where nothing else is asked for."""
    if options.cv is None and options.source in workload_names():
        return 1.0
    return options.cv


async def _play(
    options: BenchOptions, case: BenchCase, address: str, api_key: str | None
) -> BenchOutcome:
    async with AsyncClient(address, api_key=api_key) as client:
        observer = PoolObserver(client)
        before = await observer.sample()
        with _progress(len(case.trace)) as on_record:
            async with observer.observing():
                run = await play_trace(
                    case.trace,
                    ttft_seconds=options.ttft_seconds,
                    tbt_seconds=options.tbt_seconds,
                    address=address,
                    api_key=api_key,
                    seed=options.seed,
                    timeout_seconds=options.timeout_seconds,
                    on_record=on_record,
                )
        after: Status | None = None
        with contextlib.suppress(AptServeError):  # the remarks tell of it
            after = await observer.sample()
    return summed_up(case, run, before, after, observer.timeline(run.started_at))


@contextlib.contextmanager
def _progress(num_requests: int) -> Iterator[Callable[[RequestRecord], None]]:
    """A bar on a terminal; yields what is to be told of each request that ended."""
    num_good = 0
    with Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("ended, {task.fields[num_good]} good"),
        TimeElapsedColumn(),
        console=(console := Console(stderr=True)),
        disable=not console.is_terminal,
        transient=True,
        refresh_per_second=_REFRESHES_PER_SECOND,
    ) as progress:
        task = progress.add_task("", total=num_requests, num_good=num_good)

        def on_record(record: RequestRecord) -> None:
            nonlocal num_good
            num_good += record.is_good
            progress.update(task, advance=1, num_good=num_good)

        yield on_record
