"""One child process: start, stop within a time limit, and what it said last."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_TAIL_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to run: ``python -m module`` with ``environment`` on top of the supervisor's own.

    ``log_path=None`` lets it write to the supervisor's standard error.
    """

    name: str
    module: str
    environment: Mapping[str, str]
    log_path: Path | None


class Child:
    """A process of a :class:`ChildSpec`; may be started again after it has ended."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self._process: Process | None = None

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self.is_running and self._process is not None else None

    @property
    def is_running(self) -> bool:
        """Whether a process was started and has not ended."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start it in a session of its own, so that a terminal's Ctrl-C reaches the supervisor
        alone, and on a lifeline, so that it ends with the supervisor."""
        with self._open_log() as output:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "aptserve.cli.supervisor.launch", self.spec.module),
                stdin=PIPE,
                stdout=output,
                stderr=output,
                env={**os.environ, **self.spec.environment},
                start_new_session=True,
            )

    async def wait(self) -> int:
        """Wait for its end; the exit code, negative for a signal."""
        assert self._process is not None, "started before"
        return await self._process.wait()

    async def stop(self, timeout_seconds: float) -> None:
        """SIGTERM, then SIGKILL for what still runs after ``timeout_seconds``."""
        if not self.is_running:
            return
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(timeout_seconds):
                await self.wait()
        except TimeoutError:
            self.kill()
            await self.wait()

    def kill(self) -> None:
        """SIGKILL it and every process it started."""
        if self.is_running and self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def last_lines(self, count: int) -> list[str]:
        """The last lines of its log that say something; empty when it logs to the console."""
        if self.spec.log_path is None or not self.spec.log_path.exists():
            return []
        with self.spec.log_path.open("rb") as log:
            log.seek(max(0, self.spec.log_path.stat().st_size - _TAIL_BYTES))
            text = log.read().decode(errors="replace")
        return [_readable(line) for line in text.splitlines() if line.strip()][-count:]

    def _open_log(self) -> contextlib.AbstractContextManager[IO[bytes] | int]:
        if self.spec.log_path is None:
            return contextlib.nullcontext(sys.stderr.fileno())
        return self.spec.log_path.open("ab")

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "started before"
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)


def describe_exit(code: int) -> str:
    """``exit code 1`` or ``signal SIGKILL``."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal has no name
        return f"signal {-code}"


def _readable(line: str) -> str:
    """A JSON log line as one short sentence, any other line as it is."""
    try:
        record = json.loads(line)
    except ValueError:
        return line
    if not isinstance(record, dict) or "event" not in record:
        return line
    skipped = {"event", "level", "timestamp", "logger", "exception"}
    rest = " ".join(f"{key}={value}" for key, value in record.items() if key not in skipped)
    return f"{record.get('level', 'info')}: {record['event']} {rest}".rstrip()
