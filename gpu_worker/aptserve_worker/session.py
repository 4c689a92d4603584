"""A worker's life with the scheduler: dial, register, work, dial again, leave."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
import psutil
import structlog
from aptserve.v1 import worker_pb2_grpc

from aptserve_worker import wire
from aptserve_worker.attachment import (
    Attachment,
    EngineFailedError,
    ReplyEncoder,
    ScheduleProtocolError,
    StreamLostError,
    encode_reply,
)
from aptserve_worker.config import WorkerSettings
from aptserve_worker.device_thread import DeviceThread
from aptserve_worker.plan import EngineInfo

MAX_ENGINE_FAILURES = 3
"""Engine failures without a good step between them after which only a new process can help."""

LASTING_SECONDS = 5.0
"""A stream that was idle for less and broke does not count as progress: a scheduler that accepts a
worker and fails at once is dialled more and more slowly."""

MAX_MESSAGE_BYTES = 64 << 20
"""Register carries the tokenizer (the largest in use has 33 MiB of JSON); a plan may bring 256 new
sequences of 32k tokens at up to 5 bytes each, 40 MiB."""

CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A silent scheduler is noticed at most 5 s + 4 s after its last byte. The scheduler's server
    # must allow a ping every 5 s. The keepalive time-out does not cover gRPC's bandwidth probes,
    # which hold keepalive pings back; the ping time-out (60 s by default) covers both.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 4_000),
    ("grpc.http2.ping_timeout_ms", 4_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Each dial is a connection of its own: gRPC's shared back-off would add to this one's.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
)

_PERMANENT = (
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.INVALID_ARGUMENT,
)


class RefusedError(Exception):
    """The scheduler will never take this worker as it is; the message says why."""


class WorkerBrokenError(Exception):
    """The engine fails again and again, or is stuck; only a new process can help."""


class Backoff:
    """Delays before redials: 0.1 s doubling to 5 s, each shortened at random by up to half."""

    def __init__(self, first_seconds: float = 0.1, most_seconds: float = 5.0) -> None:
        self._first_seconds = first_seconds
        self._most_seconds = most_seconds
        self._num_delays = 0

    def next_seconds(self) -> float:
        """The next delay; jitter keeps many workers from dialling a new scheduler in step."""
        # The exponent is capped: 2.0**1024 overflows after a long night without a scheduler.
        delay = self._first_seconds * 2.0 ** min(self._num_delays, 32)
        self._num_delays += 1
        return min(self._most_seconds, delay) * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Start again from the first delay."""
        self._num_delays = 0


class WorkerSession:
    """Keeps one worker attached to its scheduler until it leaves.

    ``info`` is what the engine behind ``device`` serves. ``encode`` makes the replies; only fault
    injection gives another than the default.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        device: DeviceThread,
        info: EngineInfo,
        *,
        encode: ReplyEncoder = encode_reply,
    ) -> None:
        self._settings = settings
        self._device = device
        self._info = info
        self._encode = encode
        self._log: structlog.stdlib.BoundLogger = structlog.get_logger("aptserve.worker").bind(
            worker_id=settings.worker_id
        )
        self._leaving = asyncio.Event()
        self._changed = asyncio.Condition()
        self._backoff = Backoff()
        self._num_engine_failures = 0
        self._attached_at = 0.0
        self.attached = False
        """Whether a scheduler has accepted this worker and the stream lives."""
        self.num_attachments = 0
        """Times that a scheduler has accepted this worker."""

    def leave(self) -> None:
        """Take no further work; :meth:`run` returns at Detached or after ``leave_timeout``."""
        self._leaving.set()

    async def wait_attached(self, *, num_attachments: int = 1, timeout_seconds: float = 10) -> None:
        """Return once attached for at least the n-th time; ``TimeoutError`` after the limit."""
        async with asyncio.timeout(timeout_seconds), self._changed:
            await self._changed.wait_for(
                lambda: self.attached and self.num_attachments >= num_attachments
            )

    async def run(self) -> None:
        """Serve until :meth:`leave`; cancelling it drops the stream at once.

        Raises :class:`RefusedError`, :class:`WorkerBrokenError`, and what the engine's reset
        raises.
        """
        while not self._leaving.is_set():
            await self._attach_once()
            await self._pause()

    async def _attach_once(self) -> None:
        """One stream from dialling to its end, with the engine reset for the next one."""
        async with grpc.aio.insecure_channel(
            self._settings.scheduler, options=CHANNEL_OPTIONS
        ) as channel:
            call = worker_pb2_grpc.WorkerGatewayStub(channel).Attach(metadata=self._metadata())
            attachment = Attachment(call, self._device, self._log, self._encode)
            try:
                if await self._register(attachment):
                    await self._work(attachment)
            except (grpc.aio.AioRpcError, StreamLostError, TimeoutError) as error:
                self._note_progress(attachment)
                self._on_lost(error)
            except ScheduleProtocolError as error:
                self._note_progress(attachment)
                self._log.error(
                    "protocol broken, attaching again", plan_id=error.plan_id, error=str(error)
                )
            except EngineFailedError as error:
                self._note_progress(attachment)
                self._on_engine_failure(error)
            finally:
                attachment.lane.drop()
                await self._set_attached(False)
        # The stream is closed before this wait, so the scheduler need not wait for the reset.
        reset = asyncio.create_task(attachment.lane.reset())
        if await self._before_leaving(reset):
            reset.result()

    async def _register(self, attachment: Attachment) -> bool:
        """Introduce the worker; False when it is to leave before there was an answer."""
        message = wire.register_to_proto(
            self._info,
            worker_id=self._settings.worker_id,
            resident_bytes=psutil.Process().memory_info().rss,
        )
        register = asyncio.create_task(attachment.register(message))
        if not await self._before_leaving(register):
            return False
        self._log.info(
            "attached",
            scheduler=self._settings.scheduler,
            pipeline_depth=register.result().pipeline_depth,
        )
        await self._set_attached(True)
        return True

    async def _work(self, attachment: Attachment) -> None:
        """Serve plans until the stream ends; when leaving, until Detached or the limit."""
        serve = asyncio.create_task(attachment.serve())
        try:
            if not await self._before_leaving(serve, cancel=False):
                self._log.info("leaving")
                attachment.leave()
                await asyncio.wait_for(serve, self._settings.leave_timeout_seconds)
            serve.result()
            self._log.info("detached")
        except TimeoutError:
            self._log.warning(
                "left without Detached", waited_seconds=self._settings.leave_timeout_seconds
            )
        finally:
            await _cancel(serve)

    async def _before_leaving(self, task: asyncio.Task[Any], *, cancel: bool = True) -> bool:
        """Wait for the task; False, and the task cancelled, when leaving comes first."""
        leaving = asyncio.create_task(self._leaving.wait())
        try:
            await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return task.done()
        finally:
            await _cancel(leaving)
            if cancel:
                await _cancel(task)

    async def _pause(self) -> None:
        """The back-off before the next dial, cut short by :meth:`leave`."""
        if self._leaving.is_set():
            return
        delay = self._backoff.next_seconds()
        self._log.debug("dialling again", delay_seconds=round(delay, 3))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._leaving.wait(), delay)

    async def _set_attached(self, attached: bool) -> None:
        async with self._changed:
            self.attached = attached
            self._attached_at = time.monotonic()
            self.num_attachments += attached
            self._changed.notify_all()

    def _note_progress(self, attachment: Attachment) -> None:
        if attachment.num_steps:
            self._num_engine_failures = 0
            self._backoff.reset()

    def _on_lost(self, error: Exception) -> None:
        if isinstance(error, grpc.aio.AioRpcError):
            reason = f"{error.code().name}: {error.details()}"
            if error.code() in _PERMANENT:
                raise RefusedError(f"the scheduler refused this worker: {reason}") from error
        else:
            reason = str(error) or "no answer in time"
        if self.attached and time.monotonic() - self._attached_at > LASTING_SECONDS:
            self._backoff.reset()
        self._log.warning(
            "stream lost" if self.attached else "cannot attach",
            scheduler=self._settings.scheduler,
            reason=reason,
        )

    def _on_engine_failure(self, error: EngineFailedError) -> None:
        self._num_engine_failures += 1
        self._log.error(
            "engine failed, attaching again",
            plan_id=error.plan_id,
            error=str(error),
            num_failures=self._num_engine_failures,
            exc_info=error.__cause__,
        )
        if self._num_engine_failures >= MAX_ENGINE_FAILURES:
            raise WorkerBrokenError(
                f"{self._num_engine_failures} engine failures without a good step, last: {error}"
            ) from error

    def _metadata(self) -> Sequence[tuple[str, str]]:
        token = self._settings.join_token
        if token is None:
            return ()
        return (("authorization", f"Bearer {token.get_secret_value()}"),)


async def _cancel(task: asyncio.Task[Any]) -> None:
    """Cancel a task that may have ended, and see it end."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
