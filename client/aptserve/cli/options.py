"""Options that several commands share.

Settings of the services default to ``None`` here, "not given": their defaults live in the services
alone, and what ``--help`` shows is checked against them by a test.
"""

from __future__ import annotations

from typing import Annotated

import typer

from aptserve.cli.values import parse_seconds

_MODEL = "Model"
_MEMORY = "Memory and batches"
_SCHEDULING = "Scheduling"
_PROCESS = "Process"
_CONNECTION = "Connection"


def _seconds(text: str | float) -> float:
    if isinstance(text, float):  # a default comes through here as well
        return text
    try:
        return parse_seconds(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def duration(*names: str, default: str, description: str, panel: str | None = None) -> object:
    """An option whose value is a duration; ``default`` is only shown."""
    return typer.Option(
        *names,
        parser=_seconds,
        metavar="DURATION",
        show_default=default,
        help=description,
        rich_help_panel=panel,
    )


Address = Annotated[
    str,
    typer.Option(
        "--address",
        "-a",
        metavar="HOST:PORT",
        envvar="APTSERVE_ADDRESS",
        help="Where the service listens.",
        rich_help_panel=_CONNECTION,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        envvar="APTSERVE_API_KEY",
        help="Key that the service asks for; better given by the variable, which ps does not show.",
        rich_help_panel=_CONNECTION,
    ),
]
Timeout = Annotated[
    float | None,
    duration(
        "--timeout", default="none", description="Give up after this time.", panel=_CONNECTION
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]

DEFAULT_ADDRESS = "127.0.0.1:50051"

Listen = Annotated[
    str | None,
    typer.Option(
        "--listen",
        metavar="HOST:PORT",
        show_default=DEFAULT_ADDRESS,
        help="Where clients and workers dial in. Port 0 takes a free one; 0.0.0.0 lets other "
        "machines in, so set APTSERVE_SCHEDULER_API_KEY and APTSERVE_SCHEDULER_JOIN_TOKEN first.",
        rich_help_panel=_PROCESS,
    ),
]
LogLevel = Annotated[
    str | None,
    typer.Option(
        "--log-level",
        metavar="LEVEL",
        show_default="info",
        help="Least severity that is logged: debug, info, warning or error.",
        rich_help_panel=_PROCESS,
    ),
]

Policy = Annotated[
    str | None,
    typer.Option(
        "--policy",
        metavar="NAME",
        show_default="apt-slo",
        help="How batches are composed. apt-slo: so that most requests meet their objectives; "
        "apt: the paper's rule, what relieves most waiting per memory unit; fcfs: first come, "
        "first served; also chunked, qos, srtf, mlfq, vtc, wait and others.",
        rich_help_panel=_SCHEDULING,
    ),
]
PipelineDepth = Annotated[
    int | None,
    typer.Option(
        "--pipeline-depth",
        metavar="PLANS",
        show_default="2",
        help="Plans sent to a worker ahead of its results; 1 is a plain loop.",
        rich_help_panel=_SCHEDULING,
    ),
]
MaxWaiting = Annotated[
    int | None,
    typer.Option(
        "--max-waiting",
        metavar="REQUESTS",
        show_default="4096",
        help="Requests that may wait; more are refused at once with a retry delay.",
        rich_help_panel=_SCHEDULING,
    ),
]
DefaultTtft = Annotated[
    float | None,
    duration(
        "--ttft",
        default="1s",
        description="Objective for the time to the first token, of requests that state none.",
        panel=_SCHEDULING,
    ),
]
DefaultTbt = Annotated[
    float | None,
    duration(
        "--tbt",
        default="1s",
        description="Objective for the P99 time between tokens, of requests that state none.",
        panel=_SCHEDULING,
    ),
]
MetricsListen = Annotated[
    str | None,
    typer.Option(
        "--metrics-listen",
        metavar="HOST:PORT",
        show_default="off",
        help="Where Prometheus may read metrics over HTTP.",
        rich_help_panel=_PROCESS,
    ),
]

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="PATH_OR_HUB_ID",
        show_default="embedded",
        help="A folder or a hub id that transformers can load, such as facebook/opt-125m; "
        "embedded: the small code model that is installed with Apt-Serve; fake: no model at all, "
        "for tests of clients.",
        rich_help_panel=_MODEL,
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model-name",
        metavar="NAME",
        show_default="from --model",
        help="Name by which requests call the model.",
        rich_help_panel=_MODEL,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="DEVICE",
        show_default="auto",
        help="cpu, cuda or cuda:1; auto takes a GPU if there is one, each of several workers "
        "another.",
        rich_help_panel=_MODEL,
    ),
]
TensorParallel = Annotated[
    int | None,
    typer.Option(
        "--tensor-parallel",
        metavar="COUNT",
        min=1,
        max=64,
        show_default="1",
        help="GPUs of this machine that share the model, each with a part of every layer. On a CPU "
        "they are processes.",
        rich_help_panel=_MODEL,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        show_default="auto",
        help="Type of weights and cache: float32, float16 or bfloat16.",
        rich_help_panel=_MODEL,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="COUNT",
        show_default="all",
        help="CPU threads of one worker.",
        rich_help_panel=_MODEL,
    ),
]

Tiers = Annotated[
    str | None,
    typer.Option(
        "--tiers",
        metavar="LIST",
        show_default="all that are exact and pay",
        help="Cache tiers to offer, such as kv or kv,hidden. kv8 (8-bit, not exact) is offered "
        "only when named.",
        rich_help_panel=_MEMORY,
    ),
]
Kv8Format = Annotated[
    str | None,
    typer.Option(
        "--kv8-format",
        metavar="FORMAT",
        show_default="int8",
        help="Codes of the kv8 tier: int8 or fp8.",
        rich_help_panel=_MEMORY,
    ),
]
Kernels = Annotated[
    str | None,
    typer.Option(
        "--kernels",
        metavar="NAME",
        show_default="auto",
        help="Attention: auto (the fastest for the device), reference (plain, to compare with), "
        "cpu or triton.",
        rich_help_panel=_MODEL,
    ),
]
Graphs = Annotated[
    str | None,
    typer.Option(
        "--graphs",
        metavar="WHEN",
        show_default="auto",
        help="Decode steps recorded as CUDA graphs: auto (on a GPU), off, or eager (padded like "
        "recorded ones, to compare with).",
        rich_help_panel=_MODEL,
    ),
]
Overlap = Annotated[
    str | None,
    typer.Option(
        "--overlap",
        metavar="WHEN",
        show_default="auto",
        help="Steps launched while the one before runs: auto (on a GPU), off (each is waited for, "
        "to compare with) or on.",
        rich_help_panel=_MODEL,
    ),
]
PoolUnits = Annotated[
    int | None,
    typer.Option(
        "--pool-units",
        metavar="COUNT",
        show_default="by memory",
        help="Size of a worker's cache pool in units: a KV block takes 2, a hidden block 1.",
        rich_help_panel=_MEMORY,
    ),
]
PoolMemory = Annotated[
    str | None,
    typer.Option(
        "--pool-memory",
        metavar="SIZE",
        show_default="the worker decides",
        help="Size of a worker's cache pool in bytes, such as 2GiB.",
        rich_help_panel=_MEMORY,
    ),
]
BlockSize = Annotated[
    int | None,
    typer.Option(
        "--block-size",
        metavar="TOKENS",
        show_default="16",
        help="Tokens per cache block.",
        rich_help_panel=_MEMORY,
    ),
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(
        "--max-num-seqs",
        metavar="COUNT",
        show_default="256",
        help="Most sequences in one batch.",
        rich_help_panel=_MEMORY,
    ),
]
MaxNumBatchedTokens = Annotated[
    int | None,
    typer.Option(
        "--max-num-batched-tokens",
        metavar="COUNT",
        show_default="4096",
        help="Most new tokens in one batch.",
        rich_help_panel=_MEMORY,
    ),
]
