"""What the commands of operators do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.live import Live

from aptserve import Client
from aptserve.cli.connection import connected, to_json
from aptserve.cli.problems import CommandError, usage_error
from aptserve.cli.tables import plan_line, status_view

_REFRESH_SECONDS = 1.0
_HEALTH_TIMEOUT_SECONDS = 3.0


def run_status(address: str, api_key: str | None, *, json: bool, watch: bool) -> None:
    """Print the status once, or keep it on the screen."""
    if json and watch:
        raise usage_error("--json and --watch exclude each other; aptserve watch --json streams")
    console = Console(highlight=False)
    with connected(address, api_key) as client:
        status = client.status()
        if json:
            print(to_json(status, indent=2))
        elif watch:
            _watch_status(client, console)
        else:
            console.print(status_view(status))


def run_watch(
    address: str, api_key: str | None, *, worker_id: str | None, count: int | None, json: bool
) -> None:
    """Print plans as they are sent."""
    console = Console(highlight=False, soft_wrap=True)
    with connected(address, api_key) as client, client.watch_plans(worker_id) as plans:
        for number, plan in enumerate(plans, 1):
            if json:
                print(to_json(plan), flush=True)
            else:
                console.print(plan_line(plan))
            if number == count:
                return


def run_drain(address: str, api_key: str | None, *, timeout_seconds: float) -> None:
    """Wait for the drain; an error when requests were left."""
    with connected(address, api_key) as client:
        num_unfinished = client.drain(timeout_seconds)
    if num_unfinished:
        raise CommandError(f"{num_unfinished} requests still run after {timeout_seconds:g} s")
    print("drained: no request is left")


def run_abort(address: str, api_key: str | None, request_ids: Sequence[str]) -> None:
    """End requests; an error when some were not running."""
    with connected(address, api_key) as client:
        aborted = client.abort(*request_ids)
    for request_id in aborted:
        print(f"aborted {request_id}")
    missing = [request_id for request_id in request_ids if request_id not in aborted]
    if missing:
        raise CommandError(f"not running: {', '.join(missing)}")


def run_health(address: str, api_key: str | None, *, worker_id: str | None) -> None:
    """Say whether the service serves, or the worker is attached; an error when not."""
    if worker_id is None:
        _check_serving(address)
        print(f"{address}: SERVING")
        return
    with connected(address, api_key) as client:
        attached = [worker.worker_id for worker in client.status().workers]
    if not any(name == worker_id or name.startswith(f"{worker_id}-") for name in attached):
        raise CommandError(f"worker {worker_id} is not attached at {address}")
    print(f"{address}: worker {worker_id} is attached")


def _check_serving(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        try:
            response = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=_HEALTH_TIMEOUT_SECONDS
            )
        except grpc.RpcError as error:
            raise CommandError(f"{address}: no answer ({error.code().name})") from error
    if response.status != health_pb2.HealthCheckResponse.SERVING:
        name = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
        raise CommandError(f"{address}: {name}")


def _watch_status(client: Client, console: Console) -> None:
    with (
        contextlib.suppress(KeyboardInterrupt),  # the way to end it
        Live(console=console, auto_refresh=False, screen=console.is_terminal) as live,
    ):
        while True:
            live.update(status_view(client.status()), refresh=True)
            time.sleep(_REFRESH_SECONDS)
