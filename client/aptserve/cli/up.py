"""``aptserve up``: from flags to children, what is shown meanwhile, and the exit code."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from aptserve.cli.announce import announce, answer_first_prompt
from aptserve.cli.display import Display
from aptserve.cli.problems import EXIT_FAILED, EXIT_INTERRUPTED, CommandError, given, usage_error
from aptserve.cli.services import load_scheduler_settings, load_worker_settings
from aptserve.cli.supervisor.child import ChildSpec
from aptserve.cli.supervisor.keeper import ChildGaveUpError
from aptserve.cli.supervisor.probe import Probe
from aptserve.cli.supervisor.supervisor import StartTimeoutError, Supervisor
from aptserve.cli.values import dial_address, join_address, split_address

_SCHEDULER_PREFIX = "APTSERVE_SCHEDULER_"
_WORKER_PREFIX = "APTSERVE_WORKER_"


@dataclass(frozen=True, slots=True)
class UpOptions:
    """The flags of ``aptserve up``; those of a service by the name of its setting."""

    scheduler_flags: Mapping[str, object]
    worker_flags: Mapping[str, object]
    num_workers: int
    first_prompt: str | None
    verbose: bool
    log_dir: Path | None
    start_timeout_seconds: float
    grace_seconds: float


@dataclass(frozen=True, slots=True)
class Deployment:
    """What will run."""

    address: str
    """Where this machine's clients and workers reach the scheduler."""
    api_key: str | None
    log_dir: Path | None
    scheduler: ChildSpec
    workers: list[ChildSpec]


def run_up(options: UpOptions) -> int:
    """Serve until Ctrl-C; the exit code."""
    deployment = plan_deployment(options)
    try:
        return asyncio.run(_serve(deployment, options, Console(highlight=False)))
    except (ChildGaveUpError, StartTimeoutError) as error:
        where = f"; logs are in {deployment.log_dir}" if deployment.log_dir else ""
        raise CommandError(f"{error}{where}", EXIT_FAILED) from None


def plan_deployment(options: UpOptions) -> Deployment:
    """Check every setting, take the address, and lay out the children.

    Raises :class:`CommandError` for a wrong setting or an address that cannot be had.
    """
    settings = load_scheduler_settings(options.scheduler_flags)
    listen = free_address(settings.listen)
    address = dial_address(listen)
    token = _secret(settings.join_token) or secrets.token_urlsafe(24)
    scheduler_environment = _environment(
        _SCHEDULER_PREFIX,
        {
            **options.scheduler_flags,
            "listen": listen,
            "join_token": token,
            "drain_grace_seconds": options.grace_seconds,
        },
    )
    worker_environments = _worker_environments(options, address, token)
    log_dir = None if options.verbose else _make_log_dir(options.log_dir)
    return Deployment(
        address=address,
        api_key=_secret(settings.api_key),
        log_dir=log_dir,
        scheduler=_child("scheduler", "aptserve_scheduler", scheduler_environment, log_dir),
        workers=[
            _child(name, "aptserve_worker", environment, log_dir)
            for name, environment in worker_environments
        ],
    )


def free_address(listen: str) -> str:
    """The address, its port 0 replaced by a free one. Raises :class:`CommandError` if in use."""
    host, port = split_address(listen)
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            # A port in TIME_WAIT is free; one with a listener is not.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
            return join_address(host, probe.getsockname()[1])
    except OSError as error:
        reason = error.strerror or str(error)
        raise CommandError(
            f"cannot listen on {listen}: {reason}; choose another with --listen HOST:PORT"
        ) from None


async def _serve(deployment: Deployment, options: UpOptions, console: Console) -> int:
    display = Display(console, live=not options.verbose)
    async with Probe(deployment.address, deployment.api_key) as probe:
        supervisor = Supervisor(
            deployment.scheduler,
            deployment.workers,
            probe,
            display.on_change,
            grace_seconds=options.grace_seconds,
        )

        async def errand() -> None:
            with display.starting(supervisor.parts):
                snapshot = await supervisor.wait_ready(options.start_timeout_seconds)
            announce(console, deployment.address, deployment.log_dir, snapshot)
            if options.first_prompt is not None:
                await answer_first_prompt(
                    console, deployment.address, deployment.api_key, options.first_prompt
                )
            console.print("Serving. Ctrl-C stops everything.", style="dim")

        await supervisor.run(errand, on_stopping=lambda: _say_stopping(console))
    return EXIT_INTERRUPTED if supervisor.stop_request.insisted else 0


def _say_stopping(console: Console) -> None:
    console.print("\nStopping; Ctrl-C again kills at once.", style="dim")


def _worker_environments(
    options: UpOptions, address: str, token: str
) -> list[tuple[str, dict[str, str]]]:
    """Name and variables of each worker, all checked."""
    flags = dict(options.worker_flags)
    if options.num_workers > 1 and flags.get("num_threads") is None:
        flags["num_threads"] = max(1, _num_cpus() // options.num_workers)
    devices = str(flags.get("device") or "").split(",")
    environments = []
    for index in range(options.num_workers):
        own = {
            **flags,
            "device": devices[index % len(devices)] or None,
            "scheduler": address,
            "join_token": token,
            "worker_id": f"worker-{index}",
            "replica": index if options.num_workers > 1 else None,
            "leave_timeout_seconds": options.grace_seconds,
        }
        load_worker_settings(own)
        environments.append((f"worker-{index}", _environment(_WORKER_PREFIX, own)))
    return environments


def _num_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):  # where a process may be bound to some of them
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _environment(prefix: str, fields: Mapping[str, object]) -> dict[str, str]:
    return {f"{prefix}{name.upper()}": str(value) for name, value in given(fields).items()}


def _child(
    name: str, module: str, environment: Mapping[str, str], log_dir: Path | None
) -> ChildSpec:
    log_path = None if log_dir is None else log_dir / f"{name}.log"
    return ChildSpec(name, module, environment, log_path)


def _make_log_dir(wanted: Path | None) -> Path:
    if wanted is None:
        return Path(tempfile.mkdtemp(prefix="aptserve-"))
    try:
        wanted.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise usage_error(f"--log-dir {wanted}: {error.strerror}") from None
    return wanted


def _secret(value: Any) -> str | None:
    """The text of a pydantic ``SecretStr``."""
    return None if value is None else str(value.get_secret_value())
