"""``bench``: a trace played against a running service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aptserve.cli import options as opt

_WORKLOAD = "Workload"
_OBJECTIVES = "Objectives"
_OUTPUT = "Output"


def bench(
    trace: Annotated[
        str,
        typer.Option(
            "--trace",
            metavar="NAME_OR_PATH",
            help="What to play: sharegpt, humaneval or longbench, whose lengths are drawn, or the "
            "file of a trace. What is longer than the model's context is cut or left out, and the "
            "report says so.",
            rich_help_panel=_WORKLOAD,
        ),
    ],
    rate: Annotated[
        float | None,
        typer.Option(
            "--rate",
            metavar="PER_SECOND",
            show_default="the trace's own",
            help="Requests per second; arrivals of a trace are scaled to it by one factor.",
            rich_help_panel=_WORKLOAD,
        ),
    ] = None,
    cv: Annotated[
        float | None,
        typer.Option(
            "--cv",
            metavar="NUMBER",
            show_default="the trace's own arrivals, else 1",
            help="Draw the gaps between arrivals with this coefficient of variation: 0 is even, "
            "1 a Poisson process, more is burstier.",
            rich_help_panel=_WORKLOAD,
        ),
    ] = None,
    num_requests: Annotated[
        int | None,
        typer.Option(
            "--num-requests",
            "-n",
            metavar="COUNT",
            show_default="all of a file, else 1000",
            help="Requests to send.",
            rich_help_panel=_WORKLOAD,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            metavar="NUMBER",
            help="Equal seeds draw equal requests, arrivals and prompts.",
            rich_help_panel=_WORKLOAD,
        ),
    ] = 0,
    slo_ttft: Annotated[
        float,
        opt.duration(
            "--slo-ttft",
            default="1s",
            description="Objective for the time to the first token.",
            panel=_OBJECTIVES,
        ),
    ] = 1.0,
    slo_tbt: Annotated[
        float,
        opt.duration(
            "--slo-tbt",
            default="1s",
            description="Objective for the P99 time between a request's tokens.",
            panel=_OBJECTIVES,
        ),
    ] = 1.0,
    timeout: Annotated[
        float,
        opt.duration(
            "--timeout",
            default="10m",
            description="Longest time for one request; one that takes longer is a miss.",
            panel=_OBJECTIVES,
        ),
    ] = 600.0,
    json: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="PATH",
            show_default="none",
            help="Write the report, every request and the workers' measured speed to this file; "
            "the simulator reads workers from it.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="PATH",
            show_default="none",
            help="Draw the pool by tier and the queue over time into this PNG file.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    address: opt.Address = opt.DEFAULT_ADDRESS,
    api_key: opt.ApiKey = None,
) -> None:
    """Play a trace against a running service, and report how many requests met their objectives.

    Requests are sent at times fixed before the run, however slow the answers are. A request that
    fails, is refused, comes back empty or takes too long is a miss. Times are those that a client
    sees, from when the request was due.

    [bold]Examples[/]
      aptserve bench --trace humaneval --rate 4 --num-requests 100
      aptserve bench --trace azure.csv --num-requests 500 --slo-ttft 2s --slo-tbt 200ms
      aptserve bench --trace sharegpt --rate 2 --cv 5 --json run.json --plot run.png
    """
    from aptserve.cli.problems import usage_error

    try:
        from aptserve.cli.bench.run import BenchOptions, run_bench
    except ModuleNotFoundError as error:
        raise usage_error(
            f"{error.name} is not installed: pip install 'apt-serve[simulate]'"
        ) from error
    run_bench(
        BenchOptions(
            source=trace,
            rate=rate,
            cv=cv,
            num_requests=num_requests,
            seed=seed,
            ttft_seconds=slo_ttft,
            tbt_seconds=slo_tbt,
            timeout_seconds=timeout,
            json_path=json,
            plot_path=plot,
        ),
        address=address,
        api_key=api_key,
    )
