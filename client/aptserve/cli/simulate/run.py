"""What ``aptserve simulate`` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from aptserve.cli.problems import EXIT_USAGE, CommandError, usage_error
from aptserve.cli.report_tables import evaluation_view, report_view
from aptserve.cli.simulate.system import System

if TYPE_CHECKING:
    from aptserve_scheduler.sim.campaign import Campaign
    from aptserve_scheduler.sim.runs import CellSpec

    from aptserve.evaluation import Evaluation

_FLAGS = {"source": "--trace", "num_requests": "--num-requests", "rate": "--rate", "cv": "--cv"}
_LIBRARIES = ("aptserve_scheduler", "matplotlib", "numpy", "scipy")


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    """What was asked for; ``None`` and empty where a flag was not given."""

    source: str
    policies: tuple[str, ...]
    rates: tuple[float, ...]
    cvs: tuple[float, ...]
    targets: tuple[float, ...]
    num_seeds: int
    num_requests: int | None
    max_tokens: int | None
    ttft_seconds: float | None
    tbt_seconds: float | None
    num_processes: int | None
    json_path: Path | None
    plot_path: Path | None
    html_path: Path | None


def check_libraries() -> None:
    """:class:`CommandError` with how to install what is missing."""
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        raise CommandError(
            f"simulate needs {', '.join(missing)}: pip install 'apt-serve[simulate]'", EXIT_USAGE
        )


def run_simulate(options: SimulateOptions, system: System) -> None:
    """Simulate all that was asked for, print the tables, write the files."""
    console = Console(highlight=False)
    _check_outputs(options)
    campaign = _campaign(options, system)
    _check_traces(campaign)
    evaluation = _evaluate(campaign, options.num_processes)
    if len(evaluation.runs) == 1:
        console.print(report_view(evaluation.runs[0]))
    else:
        console.print(evaluation_view(_shown(evaluation, options)))
    try:
        _write(options, evaluation)
    except OSError as error:
        raise CommandError(f"cannot write {error.filename}: {error.strerror}") from None


def _campaign(options: SimulateOptions, system: System) -> Campaign:
    from aptserve_scheduler.core import Objectives
    from aptserve_scheduler.policies import UnknownPolicyError, create_policy
    from aptserve_scheduler.sim.campaign import Campaign
    from aptserve_scheduler.sim.runs import CellSpec, paper_objectives

    for policy in options.policies:
        try:
            create_policy(policy)
        except UnknownPolicyError as error:
            raise usage_error(f"--policy: {error}") from None
    default = paper_objectives(options.source, system.model)
    ttft, tbt = options.ttft_seconds, options.tbt_seconds
    objectives = Objectives(
        default.ttft_seconds if ttft is None else ttft, default.tbt_seconds if tbt is None else tbt
    )
    cvs, num_requests = _with_defaults(options, system.max_total_tokens)
    cells = tuple(
        CellSpec(
            source=options.source,
            cv=cv,
            policy=policy,
            workers=system.workers,
            system=system.name,
            objectives=objectives,
            num_requests=num_requests,
            max_total_tokens=system.max_total_tokens,
            max_tokens=options.max_tokens,
            keeps_timeline=cv == cvs[0],
        )
        for cv in cvs
        for policy in options.policies
    )
    own_rate = () if options.targets else (None,)
    return Campaign(
        cells=cells,
        seeds=tuple(range(options.num_seeds)),
        rates=options.rates or own_rate,
        targets=options.targets,
    )


def _with_defaults(
    options: SimulateOptions, max_total_tokens: int
) -> tuple[tuple[float | None, ...], int]:
    """Coefficients of variation and number of requests, given or fitting the trace.

    A trace keeps its arrivals; what has none arrives as a Poisson process.
    """
    from aptserve.workload import DEFAULT_NUM_REQUESTS, Lengths, clipped, read_workload
    from aptserve.workload import workload_names as names

    path = Path(options.source)
    has_arrivals, most = False, DEFAULT_NUM_REQUESTS
    if options.source not in names() and path.exists():
        with _problems_of_traces():
            requests = read_workload(path)
            if isinstance(requests, Lengths):
                requests = clipped(requests, max_total_tokens, "drop")
            else:
                has_arrivals = True
            most = min(most, len(requests))
    own: tuple[float | None, ...] = (None,) if has_arrivals else (1.0,)
    return options.cvs or own, options.num_requests or most


def _check_traces(campaign: Campaign) -> None:
    """Say what is wrong with a trace before the first process starts."""
    from aptserve_scheduler.sim.runs import load_trace

    rate = campaign.rates[0] if campaign.rates else campaign.limits.start
    for spec in _one_per_cv(campaign):
        with _problems_of_traces():
            load_trace(spec, rate, campaign.seeds[0])


def _one_per_cv(campaign: Campaign) -> list[CellSpec]:
    return list({spec.cv: spec for spec in campaign.cells}.values())


@contextmanager
def _problems_of_traces() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise usage_error(f"--trace: {error}") from None
    except ValueError as error:
        name, _, text = str(error).partition(": ")
        flag = _FLAGS.get(name)
        raise usage_error(f"{flag}: {text}" if flag else f"--trace: {error}") from None


def _check_outputs(options: SimulateOptions) -> None:
    """Refuse a file that cannot be written before the work, not after it."""
    outputs = {
        "--json": options.json_path,
        "--plot": options.plot_path,
        "--html": options.html_path,
    }
    for flag, path in outputs.items():
        if path is None:
            continue
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise usage_error(f"{flag}: {path} is no file in an existing folder")
        if flag == "--plot" and path.suffix.lower() != ".png":
            raise usage_error(f"{flag}: {path} must end in .png")


def _evaluate(campaign: Campaign, num_processes: int | None) -> Evaluation:
    from aptserve_scheduler.sim.campaign import evaluate

    with _progress() as show:
        try:
            return evaluate(campaign, num_processes=num_processes, on_progress=show)
        except BrokenProcessPool:
            raise CommandError(
                "a simulating process was killed, most likely for want of memory; "
                "fewer of them at a time: --jobs"
            ) from None


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error while it is a terminal."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("simulating"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as progress:
        task = progress.add_task("runs", total=None)
        yield lambda done, expected: progress.update(task, completed=done, total=expected)


def _write(options: SimulateOptions, evaluation: Evaluation) -> None:
    from aptserve.evaluation.figures import figures_of, one_figure
    from aptserve.evaluation.files import save_evaluation
    from aptserve.evaluation.page import html_page

    if options.json_path is not None:
        save_evaluation(evaluation, options.json_path)
    if options.plot_path is not None:
        options.plot_path.write_bytes(one_figure(figures_of(evaluation)))
    if options.html_path is not None:
        page = html_page(evaluation, f"Simulation of {options.source}")
        options.html_path.write_text(page, encoding="utf-8")


def _shown(evaluation: Evaluation, options: SimulateOptions) -> Evaluation:
    """The grid that was asked for; of a search the rates it found, not all that it tried."""
    from aptserve.evaluation import Evaluation

    if not options.targets:
        return evaluation
    found = {(goodput.cell, goodput.rate) for goodput in evaluation.goodputs}
    runs = (
        run
        for run in evaluation.runs
        if (run.rate in options.rates if options.rates else (run.cell, run.rate) in found)
    )
    return Evaluation(tuple(runs), evaluation.goodputs)
