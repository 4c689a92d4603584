"""``status``, ``watch``, ``drain``, ``abort`` and ``health``: the commands of operators."""

from __future__ import annotations

from typing import Annotated

import typer

from aptserve.cli import options as opt


def status(
    json: opt.Json = False,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Refresh every second until Ctrl-C.")
    ] = False,
    address: opt.Address = opt.DEFAULT_ADDRESS,
    api_key: opt.ApiKey = None,
) -> None:
    """Show workers, their memory by tier, the queue, the policy and totals.

    [bold]Examples[/]
      aptserve status
      aptserve status --watch
      aptserve status --json | jq .workers
    """
    from aptserve.cli.operation import run_status

    run_status(address, api_key, json=json, watch=watch)


def watch(
    worker: Annotated[
        str | None,
        typer.Option("--worker", metavar="NAME", show_default="all", help="Only this worker's."),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            "--count",
            "-n",
            metavar="PLANS",
            min=1,
            show_default="no end",
            help="End after so many.",
        ),
    ] = None,
    json: opt.Json = False,
    address: opt.Address = opt.DEFAULT_ADDRESS,
    api_key: opt.ApiKey = None,
) -> None:
    """Show each batch as it is composed: what runs, in which tier, and why.

    [bold]Examples[/]
      aptserve watch
      aptserve watch --worker worker-0 --count 20
      aptserve watch --json | jq -r .reason
    """
    from aptserve.cli.operation import run_watch

    run_watch(address, api_key, worker_id=worker, count=count, json=json)


def drain(
    timeout: Annotated[
        float, opt.duration("--timeout", default="30s", description="Longest wait; at most 1h.")
    ] = 30.0,
    address: opt.Address = opt.DEFAULT_ADDRESS,
    api_key: opt.ApiKey = None,
) -> None:
    """Stop accepting requests, and wait until those accepted have ended.

    Exits with 1 when some were still running at the timeout. There is no way back but a restart.

    [bold]Examples[/]
      aptserve drain
      aptserve drain --timeout 5m
    """
    from aptserve.cli.operation import run_drain

    run_drain(address, api_key, timeout_seconds=timeout)


def abort(
    request_ids: Annotated[
        list[str], typer.Argument(metavar="REQUEST_ID...", help="Requests to end.")
    ],
    address: opt.Address = opt.DEFAULT_ADDRESS,
    api_key: opt.ApiKey = None,
) -> None:
    """End running requests; their streams finish with the reason "abort".

    Exits with 1 when one of them was not running.

    [bold]Examples[/]
      aptserve abort 5f1c9a3e
    """
    from aptserve.cli.operation import run_abort

    run_abort(address, api_key, request_ids)


def health(
    worker: Annotated[
        str | None,
        typer.Option(
            "--worker",
            metavar="NAME",
            help="Ask instead whether this worker is attached: its id, or the host name that its "
            "id starts with.",
        ),
    ] = None,
    address: opt.Address = opt.DEFAULT_ADDRESS,
    api_key: opt.ApiKey = None,
) -> None:
    """Exit with 0 if a request sent now would be answered, else with 1; for health checks.

    [bold]Examples[/]
      aptserve health
      aptserve health --address scheduler:50051 --worker $HOSTNAME
    """
    from aptserve.cli.operation import run_health

    run_health(address, api_key, worker_id=worker)
