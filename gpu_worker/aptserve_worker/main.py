"""The worker process: build the engine, stay attached, leave on a signal."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import structlog
import uvloop

from aptserve_worker.config import FAKE_MODEL, WorkerSettings
from aptserve_worker.device_thread import DeviceStuckError, DeviceThread
from aptserve_worker.exit_codes import EXIT_BROKEN, EXIT_OK, EXIT_PERMANENT
from aptserve_worker.gpus import hide_gpus_of_others
from aptserve_worker.logs import configure_logging
from aptserve_worker.plan import Engine
from aptserve_worker.session import RefusedError, WorkerBrokenError, WorkerSession

CLOSE_TIMEOUT_SECONDS = 5.0
"""Longest wait at the end for the step under way; the process leaves without it."""


def build_engine(settings: WorkerSettings) -> Engine:
    """The engine that the settings name; torch is imported only for a real one."""
    if settings.model == FAKE_MODEL:
        from aptserve_worker.fake import FakeEngine, FakeModel

        return FakeEngine(FakeModel.from_settings(settings), overlaps=settings.overlap == "on")
    if settings.replica is not None and settings.device in ("auto", "cuda"):
        hide_gpus_of_others(settings.replica, settings.tensor_parallel)
    if settings.tensor_parallel > 1:
        from aptserve_worker.parallel.engine import ParallelEngine

        return ParallelEngine(settings)
    from aptserve_worker import engine

    return engine.build_engine(settings)


def main(settings: WorkerSettings) -> int:
    """Run a worker until a signal ends it and return the exit code.

    SIGTERM or SIGINT: leave in good order within ``leave_timeout_seconds``; a second one: at once.
    """
    configure_logging(settings.log_level, settings.log_format)
    device = DeviceThread(lambda: build_engine(settings))
    code = uvloop.run(_Process(settings, device).run())
    if device.is_alive:
        sys.stdout.flush()
        sys.stderr.flush()
        # The thread is inside native code; tearing the interpreter down around it may crash.
        os._exit(code)
    return code


class _Process:
    """One life: build, attach, work, leave."""

    def __init__(self, settings: WorkerSettings, device: DeviceThread) -> None:
        self._settings = settings
        self._device = device
        self._log: structlog.stdlib.BoundLogger = structlog.get_logger("aptserve.worker").bind(
            worker_id=settings.worker_id
        )
        self._session: WorkerSession | None = None
        self._leaving = False

    async def run(self) -> int:
        """The exit code."""
        life = asyncio.create_task(self._live())
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, life)
        await asyncio.wait({life})
        await self._device.close(CLOSE_TIMEOUT_SECONDS)
        return EXIT_OK if life.cancelled() else life.result()

    def _on_signal(self, life: asyncio.Task[int]) -> None:
        """First signal: leave in good order if there is something to leave. Else end at once."""
        if self._session is None or self._leaving:
            life.cancel()
        else:
            self._leaving = True
            self._session.leave()

    async def _live(self) -> int:
        self._log.info("building the engine", model=self._settings.model)
        try:
            info = await self._device.start()
        except Exception as error:
            return self._report_build_failure(error)
        self._log.info(
            "engine ready",
            model=info.model_name,
            device=info.device,
            num_units=info.num_units,
            tiers=[t.tier.name.lower() for t in info.tiers],
        )
        self._session = WorkerSession(self._settings, self._device, info)
        try:
            await self._session.run()
        except RefusedError as error:
            self._log.error(str(error))
            return EXIT_PERMANENT
        except (WorkerBrokenError, DeviceStuckError) as error:
            self._log.error(str(error))
            return EXIT_BROKEN
        except Exception:
            self._log.exception("worker ends by a fault of its own")
            return EXIT_BROKEN
        return EXIT_OK

    def _report_build_failure(self, error: Exception) -> int:
        """One line for what the operator can mend, a traceback for what only we can."""
        expected = isinstance(error, ValueError | OSError)
        self._log.error(
            "cannot serve the model",
            model=self._settings.model,
            error=str(error),
            exc_info=None if expected else error,
        )
        return EXIT_PERMANENT if isinstance(error, ValueError) else EXIT_BROKEN
