"""A service of one scheduler and one worker, for as long as something is done with it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from aptserve.cli.problems import EXIT_INTERRUPTED, CommandError
from aptserve.cli.services import load_worker_settings
from aptserve.cli.supervisor.keeper import ChildGaveUpError
from aptserve.cli.supervisor.parts import Part, State
from aptserve.cli.supervisor.probe import Probe
from aptserve.cli.supervisor.supervisor import StartTimeoutError, StopRequest, Supervisor
from aptserve.cli.up import UpOptions, plan_deployment

POOL_UNITS = 280
"""Room for one long prompt and some short ones as keys and values."""
START_TIMEOUT_SECONDS = 120.0
_GRACE_SECONDS = 1.0
"""Of the few requests that may be left at the end: they were cancelled, this is their clean-up."""

Result = TypeVar("Result")
Errand = Callable[[str, str | None], Awaitable[Result]]
"""What is done with a service, given its address and API key."""


class _ErrandIsDoneError(Exception):
    """Ends a supervisor's run: an error of its errand does."""


async def during_service(
    policy: str, errand: Errand[Result], on_trouble: Callable[[str], None]
) -> Result:
    """Start a service under ``policy``, run the errand, stop the service, and give the result.

    ``on_trouble`` is told when a process died and is started again.

    Settings other than those of the demo come from APTSERVE_SCHEDULER_* and APTSERVE_WORKER_*.
    Raises :class:`CommandError`, with exit code 130 after Ctrl-C, and what the errand raises; no
    process is left in any case.
    """
    with tempfile.TemporaryDirectory(prefix="aptserve-demo-") as log_folder:
        try:
            return await _serve(_options(policy, Path(log_folder)), errand, on_trouble)
        except (ChildGaveUpError, StartTimeoutError) as error:
            raise CommandError(str(error)) from None


async def _serve(
    options: UpOptions, errand: Errand[Result], on_trouble: Callable[[str], None]
) -> Result:
    def on_change(part: Part) -> None:
        if part.state is State.RESTARTING:
            on_trouble(f"{part.name} {part.detail}.")

    deployment = plan_deployment(options)
    results: list[Result] = []
    async with Probe(deployment.address, deployment.api_key) as probe:
        supervisor = Supervisor(
            deployment.scheduler,
            deployment.workers,
            probe,
            on_change,
            grace_seconds=options.grace_seconds,
        )

        async def run_errand() -> None:
            await supervisor.wait_ready(options.start_timeout_seconds)
            results.append(await errand(deployment.address, deployment.api_key))
            raise _ErrandIsDoneError

        with contextlib.suppress(_ErrandIsDoneError):
            await supervisor.run(run_errand, on_stopping=lambda: None)
    # Ctrl-C may also have come while the service was being stopped after its errand.
    if not results or await _is_requested(supervisor.stop_request):
        raise CommandError("interrupted", EXIT_INTERRUPTED)
    return results[0]


def _options(policy: str, log_folder: Path) -> UpOptions:
    return UpOptions(
        scheduler_flags={"policy": policy, "listen": "127.0.0.1:0"},
        worker_flags={"pool_units": POOL_UNITS, "num_threads": _num_threads()},
        num_workers=1,
        first_prompt=None,
        verbose=False,
        log_dir=log_folder,
        start_timeout_seconds=START_TIMEOUT_SECONDS,
        grace_seconds=_GRACE_SECONDS,
    )


def _num_threads() -> int:
    """As set, else all processors but one: the clients and the scheduler are here as well."""
    wanted: int | None = load_worker_settings({}).num_threads
    if wanted:
        return wanted
    is_bound = hasattr(os, "sched_getaffinity")  # to some of the machine's processors
    num_cpus = len(os.sched_getaffinity(0)) if is_bound else os.cpu_count() or 1
    return max(1, num_cpus - 1)


async def _is_requested(stop: StopRequest) -> bool:
    try:
        async with asyncio.timeout(0):
            await stop.wait()
    except TimeoutError:
        return False
    return True
