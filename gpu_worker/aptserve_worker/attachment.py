"""One stream to the scheduler, from Register to its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import grpc
import grpc.aio
import structlog
from aptserve.v1 import worker_pb2

from aptserve_worker import wire
from aptserve_worker.device_thread import DeviceThread, Failed, Outcome, Step
from aptserve_worker.plan import PlanError

REGISTER_TIMEOUT_SECONDS = 10.0
_CLOSE_TIMEOUT_SECONDS = 2.0


class StreamLostError(Exception):
    """The stream ended and may be dialled again; the message says why."""


class PlanFaultError(Exception):
    """Something went wrong with ``plan_id``, where it is known which plan it was."""

    def __init__(self, message: str, plan_id: int | None = None) -> None:
        super().__init__(message)
        self.plan_id = plan_id


class ScheduleProtocolError(PlanFaultError):
    """The peers disagree about the protocol or about the state of a sequence."""


class EngineFailedError(PlanFaultError):
    """The engine raised something that is not the scheduler's fault."""


ReplyEncoder = Callable[[Step], Iterable[worker_pb2.AttachRequest]]
"""Makes the messages that answer a step: exactly one, except where a test injects a fault."""


def encode_reply(step: Step) -> Iterable[worker_pb2.AttachRequest]:
    """The one StepResult that answers a step."""
    result = wire.step_result_to_proto(
        step.plan_id,
        step.output,
        step_seconds=step.step_seconds,
        gap_seconds=step.gap_seconds,
    )
    return (worker_pb2.AttachRequest(step_result=result),)


class Attachment:
    """Reads plans into a lane of the device thread and writes their results, both in order."""

    def __init__(
        self,
        call: Any,
        device: DeviceThread,
        log: structlog.stdlib.BoundLogger,
        encode: ReplyEncoder = encode_reply,
    ) -> None:
        self._call = call
        self._log = log
        self._encode = encode
        self._outgoing: asyncio.Queue[Outcome | worker_pb2.Leaving] = asyncio.Queue()
        self._num_plans = 0
        self.lane = device.open_lane(self._outgoing.put_nowait)
        self.num_steps = 0
        """Steps that went well on this stream."""

    async def register(self, message: worker_pb2.Register) -> worker_pb2.Registered:
        """Introduce the worker and return the scheduler's answer.

        Raises ``TimeoutError`` without an answer in time (connecting included), ``AioRpcError`` for
        a refusal and :class:`ScheduleProtocolError` for another answer. A refusal that arrives
        while Register is being sent shows as INTERNAL: grpc.aio then replaces the status by its own
        failure to write. The next dial tells.
        """
        async with asyncio.timeout(REGISTER_TIMEOUT_SECONDS):
            # A call refused before the write: the read below tells why.
            with contextlib.suppress(asyncio.InvalidStateError):
                await self._call.write(worker_pb2.AttachRequest(register=message))
            answer = await self._call.read()
        if answer is grpc.aio.EOF:
            raise StreamLostError("the scheduler closed the stream before Registered")
        if answer.WhichOneof("message") != "registered":
            raise ScheduleProtocolError(
                f"expected Registered first, got {answer.WhichOneof('message')}"
            )
        registered: worker_pb2.Registered = answer.registered
        return registered

    def leave(self) -> None:
        """Ask the scheduler for no further plans; :meth:`serve` returns at its Detached."""
        self._outgoing.put_nowait(worker_pb2.Leaving())

    async def serve(self) -> None:
        """Work until Detached.

        Raises ``AioRpcError`` or :class:`StreamLostError` when the stream is lost,
        :class:`ScheduleProtocolError` for a wrong plan, :class:`EngineFailedError` for an engine
        that raised.
        """
        reader = asyncio.create_task(self._read(), name="attachment-read")
        writer = asyncio.create_task(self._write(), name="attachment-write")
        try:
            done, _ = await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self.lane.drop()
            reader.cancel()
            writer.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _read(self) -> None:
        while (message := await self._call.read()) is not grpc.aio.EOF:
            match message.WhichOneof("message"):
                case "batch_plan":
                    self._submit(message.batch_plan)
                case "release":
                    self.lane.release(tuple(message.release.sequence_ids))
                case "detached":
                    await self._close()
                    return
                case other:
                    raise ScheduleProtocolError(f"unexpected message {other}")
        raise StreamLostError("the scheduler closed the stream")

    def _submit(self, message: worker_pb2.BatchPlan) -> None:
        self._num_plans += 1
        if message.plan_id != self._num_plans:
            raise ScheduleProtocolError(
                f"the plan came as number {self._num_plans}", message.plan_id
            )
        try:
            plan = wire.plan_from_proto(message)
        except PlanError as error:
            raise ScheduleProtocolError(str(error), message.plan_id) from error
        self.lane.submit(plan)

    async def _close(self) -> None:
        """Half-close and give the scheduler a moment to end the call with its status."""
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_SECONDS):
                await self._call.done_writing()
                await self._call.read()
        except (TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            self._log.debug("stream did not close cleanly", error=repr(error))

    async def _write(self) -> None:
        while True:
            outcome = await self._outgoing.get()
            if isinstance(outcome, Failed):
                raise _blame(outcome) from outcome.error
            if isinstance(outcome, Step):
                self.num_steps += 1
                self._log.debug(
                    "step done",
                    plan_id=outcome.plan_id,
                    num_outputs=len(outcome.output.outputs),
                    step_seconds=outcome.step_seconds,
                    gap_seconds=outcome.gap_seconds,
                )
                messages = self._encode(outcome)
            else:
                messages = (worker_pb2.AttachRequest(leaving=outcome),)
            for message in messages:
                await self._send(message)

    async def _send(self, message: worker_pb2.AttachRequest) -> None:
        try:
            await self._call.write(message)
        except asyncio.InvalidStateError as error:
            raise StreamLostError("the stream ended before a result could be sent") from error


def _blame(failed: Failed) -> PlanFaultError:
    if isinstance(failed.error, PlanError):
        return ScheduleProtocolError(str(failed.error), failed.plan_id)
    return EngineFailedError(repr(failed.error), failed.plan_id)
