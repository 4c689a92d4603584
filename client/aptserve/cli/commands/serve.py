"""``up``, ``scheduler`` and ``worker``: the commands that serve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from aptserve.cli import options as opt

# Parameters below that have the name of a setting are that setting's flag.
_SCHEDULER_FIELDS = (
    "listen",
    "policy",
    "pipeline_depth",
    "max_waiting",
    "ttft_objective_seconds",
    "tbt_objective_seconds",
    "metrics_listen",
    "log_level",
)
_WORKER_FIELDS = (
    "scheduler",
    "worker_id",
    "model",
    "model_name",
    "pool_units",
    "pool_memory",
    "tiers",
    "kv8_format",
    "block_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "device",
    "tensor_parallel",
    "dtype",
    "kernels",
    "graphs",
    "overlap",
    "num_threads",
    "log_level",
)


def up(
    model: opt.Model = None,
    num_workers: Annotated[
        int,
        typer.Option(
            "--workers", "-n", metavar="COUNT", min=1, max=64, help="Worker processes to run."
        ),
    ] = 1,
    policy: opt.Policy = None,
    listen: opt.Listen = None,
    pool_units: opt.PoolUnits = None,
    pool_memory: opt.PoolMemory = None,
    tiers: opt.Tiers = None,
    kv8_format: opt.Kv8Format = None,
    block_size: opt.BlockSize = None,
    max_num_seqs: opt.MaxNumSeqs = None,
    max_num_batched_tokens: opt.MaxNumBatchedTokens = None,
    pipeline_depth: opt.PipelineDepth = None,
    max_waiting: opt.MaxWaiting = None,
    ttft_objective_seconds: opt.DefaultTtft = None,
    tbt_objective_seconds: opt.DefaultTbt = None,
    model_name: opt.ModelName = None,
    device: opt.Device = None,
    tensor_parallel: opt.TensorParallel = None,
    dtype: opt.Dtype = None,
    kernels: opt.Kernels = None,
    graphs: opt.Graphs = None,
    overlap: opt.Overlap = None,
    num_threads: opt.Threads = None,
    first_prompt: Annotated[
        str | None,
        typer.Option(
            "--first-prompt",
            metavar="TEXT",
            help="Answer this prompt on the screen once everything is ready, then go on serving.",
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the logs here instead of writing files.")
    ] = False,
    log_dir: Annotated[
        Path | None,
        typer.Option(
            "--log-dir", metavar="FOLDER", show_default="a new one", help="Where log files go."
        ),
    ] = None,
    log_level: opt.LogLevel = None,
    metrics_listen: opt.MetricsListen = None,
    start_timeout: Annotated[
        float,
        opt.duration(
            "--start-timeout",
            default="10m",
            description="Give up when not everything is ready by then.",
        ),
    ] = 600.0,
    grace: Annotated[
        float,
        opt.duration(
            "--grace", default="3s", description="How long running requests may go on after Ctrl-C."
        ),
    ] = 3.0,
) -> None:
    """Start the scheduler and local workers, and keep them running until Ctrl-C.

    A child that dies is started again. Ctrl-C lets running requests end, stops everything and
    exits with 0; a second Ctrl-C kills at once and exits with 130. Settings without a flag are read
    from APTSERVE_SCHEDULER_* and APTSERVE_WORKER_* variables.

    [bold]Examples[/]
      aptserve up
      aptserve up --model facebook/opt-125m --pool-memory 2GiB
      aptserve up --workers 2 --policy fcfs --listen 127.0.0.1:9000
      aptserve up --tiers kv,hidden --pool-units 512 --verbose
    """
    flags = locals()
    from aptserve.cli.up import UpOptions, run_up

    options = UpOptions(
        scheduler_flags=_pick(flags, _SCHEDULER_FIELDS),
        worker_flags=_pick(flags, _WORKER_FIELDS),
        num_workers=num_workers,
        first_prompt=first_prompt,
        verbose=verbose,
        log_dir=log_dir,
        start_timeout_seconds=start_timeout,
        grace_seconds=grace,
    )
    raise typer.Exit(run_up(options))


def scheduler(
    listen: opt.Listen = None,
    policy: opt.Policy = None,
    pipeline_depth: opt.PipelineDepth = None,
    max_waiting: opt.MaxWaiting = None,
    ttft_objective_seconds: opt.DefaultTtft = None,
    tbt_objective_seconds: opt.DefaultTbt = None,
    metrics_listen: opt.MetricsListen = None,
    log_level: opt.LogLevel = None,
) -> None:
    """Run the scheduler service alone; workers dial in.

    Every setting may also come from APTSERVE_SCHEDULER_* variables; the secrets
    APTSERVE_SCHEDULER_JOIN_TOKEN and APTSERVE_SCHEDULER_API_KEY only from there. SIGTERM drains,
    then stops.

    [bold]Examples[/]
      aptserve scheduler
      APTSERVE_SCHEDULER_JOIN_TOKEN=secret aptserve scheduler --listen 0.0.0.0:50051
    """
    flags = locals()
    from aptserve.cli.services import run_scheduler

    raise typer.Exit(run_scheduler(_pick(flags, _SCHEDULER_FIELDS)))


def worker(
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler",
            metavar="HOST:PORT",
            show_default=opt.DEFAULT_ADDRESS,
            help="Scheduler service to dial.",
        ),
    ] = None,
    worker_id: Annotated[
        str | None,
        typer.Option(
            "--worker-id",
            metavar="NAME",
            show_default="from host and process",
            help="Name, unique among the workers of one scheduler.",
        ),
    ] = None,
    model: opt.Model = None,
    model_name: opt.ModelName = None,
    pool_units: opt.PoolUnits = None,
    pool_memory: opt.PoolMemory = None,
    tiers: opt.Tiers = None,
    kv8_format: opt.Kv8Format = None,
    block_size: opt.BlockSize = None,
    max_num_seqs: opt.MaxNumSeqs = None,
    max_num_batched_tokens: opt.MaxNumBatchedTokens = None,
    device: opt.Device = None,
    tensor_parallel: opt.TensorParallel = None,
    dtype: opt.Dtype = None,
    kernels: opt.Kernels = None,
    graphs: opt.Graphs = None,
    overlap: opt.Overlap = None,
    num_threads: opt.Threads = None,
    log_level: opt.LogLevel = None,
) -> None:
    """Run one worker; it dials the scheduler, and dials again whenever the connection is lost.

    Every setting may also come from APTSERVE_WORKER_* variables; the secret
    APTSERVE_WORKER_JOIN_TOKEN only from there. Exit code 3 means that a new start would not help:
    the model or the scheduler refused.

    [bold]Examples[/]
      aptserve worker
      aptserve worker --scheduler scheduler.example:50051 --model facebook/opt-125m
      aptserve worker --model ./my-checkpoint --pool-memory 2GiB --tiers kv,hidden
      aptserve worker --model meta-llama/Llama-2-13b-hf --tensor-parallel 2
    """
    flags = locals()
    from aptserve.cli.services import run_worker

    raise typer.Exit(run_worker(_pick(flags, _WORKER_FIELDS)))


def _pick(values: Mapping[str, object], fields: tuple[str, ...]) -> dict[str, object]:
    return {field: values[field] for field in fields if field in values}
