"""Commands of the ``aptserve`` command line, run in this process or as processes of their own."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import psutil

from support.eventually import eventually

TIMEOUT_SECONDS = 60.0


@dataclass
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def error_line(self) -> str:
        """Its only line on standard error."""
        (line,) = self.err.splitlines()
        return line


Cli = Callable[..., Outcome]
"""Runs ``aptserve`` with these arguments."""


async def run_command(*arguments: str) -> Outcome:
    """Run ``aptserve`` to its end."""
    process = await start_command(*arguments)
    async with asyncio.timeout(TIMEOUT_SECONDS):
        out, err = await process.communicate()
    assert process.returncode is not None
    return Outcome(process.returncode, out.decode(), err.decode())


async def start_command(*arguments: str) -> Process:
    """Start ``aptserve`` in a session of its own, as a terminal would."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aptserve.cli", *arguments),
        stdout=PIPE,
        stderr=PIPE,
        start_new_session=True,
        env={**os.environ, "COLUMNS": "200"},
    )


class Up:
    """A running ``aptserve up``."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.output: list[str] = []
        self.address = ""

    async def read_until(self, pattern: str) -> str:
        """Read its output up to the first line that matches, and return that line."""
        assert self.process.stdout is not None
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while line := (await self.process.stdout.readline()).decode():
                self.output.append(line)
                if re.search(pattern, line):
                    return line
        raise AssertionError(f"ended without {pattern!r}:\n{''.join(self.output)}")

    async def wait_serving(self) -> None:
        """Wait until everything is ready."""
        self.address = (await self.read_until(r"^address ")).split()[1]
        await self.read_until(r"^Serving")

    def children(self) -> list[psutil.Process]:
        """Its child processes, the scheduler first."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return sorted(children, key=lambda child: child.pid)

    async def signal_and_wait(self, number: signal.Signals = signal.SIGINT) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        async with asyncio.timeout(TIMEOUT_SECONDS):
            return await self.process.wait()


async def assert_gone(processes: list[psutil.Process]) -> None:
    """No process of the list is left, or comes to its end soon."""
    await eventually(
        lambda: (
            not any(
                process.is_running() and process.status() != psutil.STATUS_ZOMBIE
                for process in processes
            )
        ),
        message="children are gone",
    )


class StartUp(Protocol):
    """Starts ``aptserve up`` on a free port with the fake engine and these further arguments."""

    async def __call__(self, *arguments: str, serving: bool = True) -> Up: ...
