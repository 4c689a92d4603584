"""``simulate``: schedulers compared on made-up machines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from aptserve.cli import options as opt

_T = TypeVar("_T")

_WORKLOAD = "Workload"
_SYSTEM = "System"
_OBJECTIVES = "Objectives"
_OUTPUT = "Output"


def simulate(
    trace: Annotated[
        str,
        typer.Option(
            "--trace",
            metavar="NAME|FILE",
            help="What to play: sharegpt, humaneval or longbench, whose lengths are drawn, or the "
            "file of a trace. What is longer than the model's context is cut or left out.",
            rich_help_panel=_WORKLOAD,
        ),
    ],
    policy: Annotated[
        str,
        typer.Option(
            "--policy", metavar="NAME,...", help="Policies to compare.", rich_help_panel=_SYSTEM
        ),
    ] = "apt,fcfs",
    rate: Annotated[
        str | None,
        typer.Option(
            "--rate",
            metavar="RATES",
            show_default="the trace's own",
            help="Requests per second: one (4), a list (1,2,4) or a range with its step (1:12:1). "
            "Arrivals are scaled to it, never drawn anew.",
            rich_help_panel=_WORKLOAD,
        ),
    ] = None,
    cv: Annotated[
        str | None,
        typer.Option(
            "--cv",
            metavar="NUMBER,...",
            show_default="the trace's own arrivals, else 1",
            help="Draw gaps between arrivals with these coefficients of variation: 0 is even, 1 a "
            "Poisson process, more is burstier.",
            rich_help_panel=_WORKLOAD,
        ),
    ] = None,
    num_requests: Annotated[
        int | None,
        typer.Option(
            "--num-requests",
            "-n",
            metavar="COUNT",
            min=1,
            show_default="1000, or all of a shorter trace",
            help="Requests of a run.",
            rich_help_panel=_WORKLOAD,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            metavar="COUNT",
            min=1,
            show_default="what each will generate",
            help="Most output tokens that requests allow themselves. Without, schedulers know "
            "beforehand how long each answer will be.",
            rich_help_panel=_WORKLOAD,
        ),
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(
            "--seeds",
            metavar="COUNT",
            min=1,
            help="Runs of each case with requests drawn anew, the same for all policies. From 2 on "
            "there are confidence intervals.",
            rich_help_panel=_WORKLOAD,
        ),
    ] = 1,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            show_default="opt-13b",
            help="Model to serve.",
            rich_help_panel=_SYSTEM,
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            metavar="NAME",
            show_default="a100-40g",
            help="GPU of a worker.",
            rich_help_panel=_SYSTEM,
        ),
    ] = None,
    tiers: Annotated[
        str | None,
        typer.Option(
            "--tiers",
            metavar="NAME,...",
            show_default="kv,hidden",
            help="Cache tiers: kv, or kv,hidden.",
            rich_help_panel=_SYSTEM,
        ),
    ] = None,
    hidden_attention: Annotated[
        str | None,
        typer.Option(
            "--hidden-attention",
            metavar="FORM",
            show_default="the model's best",
            help="How attention reads hidden states: absorbed, reprojected (the paper's) or, with "
            "a rotary embedding, projected.",
            rich_help_panel=_SYSTEM,
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            show_default="none",
            help="In place of model and GPU: a live worker as measured, from the file that "
            "aptserve bench --json wrote.",
            rich_help_panel=_SYSTEM,
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            "--workers", metavar="COUNT", min=1, help="Equal workers.", rich_help_panel=_SYSTEM
        ),
    ] = 1,
    slo_ttft: Annotated[
        float | None,
        opt.duration(
            "--slo-ttft",
            default="the paper's for its workloads, else 1s",
            description="Objective for the time to the first token.",
            panel=_OBJECTIVES,
        ),
    ] = None,
    slo_tbt: Annotated[
        float | None,
        opt.duration(
            "--slo-tbt",
            default="the paper's for its workloads, else 1s",
            description="Objective for the P99 time between a request's tokens.",
            panel=_OBJECTIVES,
        ),
    ] = None,
    goodput: Annotated[
        str | None,
        typer.Option(
            "--goodput",
            metavar="SHARE,...",
            show_default="no search",
            help="Search the highest rate at which these shares of the requests meet both "
            "objectives, such as 0.9 or 0.9,0.7,0.5; besides the rates of --rate.",
            rich_help_panel=_OBJECTIVES,
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            show_default="none",
            help="Write all results, without single requests.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE.png",
            show_default="none",
            help="Draw attainment by rate, goodput, and the pool over time.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            show_default="none",
            help="Write figures and tables as one page that needs nothing else.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            "-j",
            metavar="COUNT",
            min=1,
            show_default="all cores",
            help="Processes.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
) -> None:
    """Play a trace to simulated workers, and compare how many requests meet their objectives.

    The scheduler and the policies are the very code that serves; only the workers are numbers,
    from a model of the hardware or as measured live. All policies get the same requests. A request
    that fails or that no pool can hold is a miss.

    [bold]Examples[/]
      aptserve simulate --trace sharegpt --policy apt-slo,apt,fcfs --rate 1:6:1 --max-tokens 2048
      aptserve simulate --trace sharegpt --goodput 0.9,0.5 --cv 1,5,10 --html out.html
      aptserve simulate --trace azure.csv --num-requests 500 --model opt-30b --gpu h100
      aptserve simulate --trace humaneval --rate 4 --calibration bench.json --plot out.png
    """
    from aptserve.cli.simulate import values
    from aptserve.cli.simulate.run import SimulateOptions, check_libraries, run_simulate
    from aptserve.cli.simulate.system import system_of

    check_libraries()
    options = SimulateOptions(
        source=trace,
        policies=_read("--policy", values.parse_names, policy),
        rates=_read("--rate", values.parse_rates, rate),
        cvs=_read("--cv", values.parse_cvs, cv),
        targets=_read("--goodput", values.parse_targets, goodput),
        num_seeds=seeds,
        num_requests=num_requests,
        max_tokens=max_tokens,
        ttft_seconds=slo_ttft,
        tbt_seconds=slo_tbt,
        num_processes=jobs,
        json_path=json,
        plot_path=plot,
        html_path=html,
    )
    names = _read("--tiers", values.parse_names, tiers) or None
    system = system_of(model, gpu, names, hidden_attention, calibration, workers)
    run_simulate(options, system)


def _read(flag: str, parse: Callable[[str], tuple[_T, ...]], text: str | None) -> tuple[_T, ...]:
    """What a flag says, nothing when it was not given."""
    from aptserve.cli.problems import usage_error

    if text is None:
        return ()
    try:
        return parse(text)
    except ValueError as error:
        raise usage_error(f"{flag}: {error}") from None
