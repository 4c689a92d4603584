"""Where workers dial in: one stream each, from Register to Detached."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import structlog
from aptserve.errors import (
    AptServeError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    ProtocolError,
    UnavailableError,
)
from aptserve.v1 import worker_pb2, worker_pb2_grpc

from aptserve_scheduler.api import wire
from aptserve_scheduler.core.types import BatchPlan, SequenceId
from aptserve_scheduler.delivery import INTERNAL_TEXT
from aptserve_scheduler.driver import Driver
from aptserve_scheduler.model import ModelSlot
from aptserve_scheduler.workers import AttachedWorker

_log = structlog.stdlib.get_logger(__name__)
_REGISTER_TIMEOUT_SECONDS = 10.0
_MAX_UNSENT_MESSAGES = 64
"""Plans are bounded by the pipeline's depth; more than this means that the books are wrong."""

_Requests = AsyncIterator[worker_pb2.AttachRequest]


class StreamPort:
    """The sending side of one Attach stream: a bounded queue that the call empties."""

    def __init__(self, register: worker_pb2.Register) -> None:
        self.device = register.device
        self.unit_bytes = register.pool.unit_bytes
        self.resident_bytes = register.resident_bytes
        self._unsent: deque[worker_pb2.AttachResponse] = deque()
        self._error: AptServeError | None = None
        self._is_closed = False
        self._wake = asyncio.Event()

    def send(self, message: worker_pb2.AttachResponse) -> None:
        """Queue a message. Raises ``OverflowError`` when the worker reads nothing any more."""
        if len(self._unsent) >= _MAX_UNSENT_MESSAGES:
            raise OverflowError(f"{len(self._unsent)} messages were not read")
        self._unsent.append(message)
        self._wake.set()

    def send_plan(self, plan: BatchPlan) -> None:
        """Work to do."""
        self.send(wire.plan_to_proto(plan))

    def send_release(self, sequence_ids: Sequence[SequenceId]) -> None:
        """Sequences to forget while no plan is due."""
        self.send(wire.release_to_proto(sequence_ids))

    def send_detached(self) -> None:
        """The worker may go: the last message."""
        self.send(worker_pb2.AttachResponse(detached=worker_pb2.Detached()))
        self.close()

    def close(self) -> None:
        """End the stream after what is queued."""
        self._is_closed = True
        self._wake.set()

    def cut(self, error: AptServeError) -> None:
        """End the stream with an error; what is queued is dropped."""
        if self._error is None and not self._is_closed:
            self._error = error
            self._wake.set()

    async def messages(self) -> AsyncIterator[worker_pb2.AttachResponse]:
        """What is to be sent, until :meth:`close`; raises the error of :meth:`cut`."""
        while True:
            if self._error is not None:
                raise self._error
            if self._unsent:
                yield self._unsent.popleft()
            elif self._is_closed:
                return
            else:
                self._wake.clear()
                await self._wake.wait()


class WorkerGateway(worker_pb2_grpc.WorkerGatewayServicer):
    """Lets workers in and carries plans and results."""

    def __init__(
        self,
        driver: Driver,
        models: ModelSlot,
        *,
        pipeline_depth: int,
        is_stopping: Callable[[], bool],
    ) -> None:
        self._driver = driver
        self._models = models
        self._pipeline_depth = pipeline_depth
        self._is_stopping = is_stopping

    async def Attach(  # noqa: N802 - the name of the RPC
        self, request_iterator: Any, context: grpc.ServicerContext
    ) -> AsyncIterator[worker_pb2.AttachResponse]:
        """One stream per worker for as long as the worker lives."""
        register = await _read_register(request_iterator)
        port, worker = await self._admit(register)
        log = _log.bind(worker_id=register.worker_id)
        log.info("worker attached", device=register.device, num_units=register.pool.num_units)
        reader = asyncio.create_task(self._read_results(request_iterator, port, worker))
        try:
            async for message in port.messages():
                yield message
        finally:
            reader.cancel()
            self._driver.detach(worker)
            await asyncio.gather(reader, return_exceptions=True)
            log.info("worker detached")

    async def _admit(self, register: worker_pb2.Register) -> tuple[StreamPort, AttachedWorker]:
        """Check a worker and take it in; Registered is the first message of its port."""
        if register.protocol_version != wire.PROTOCOL_VERSION:
            raise FailedPreconditionError(
                f"protocol version {register.protocol_version}; "
                f"{wire.PROTOCOL_VERSION} is spoken here"
            )
        spec = wire.worker_spec_from_proto(register)
        await self._models.adopt(register.model)
        if self._is_stopping():
            raise UnavailableError("the scheduler is stopping")
        port = StreamPort(register)
        port.send(
            worker_pb2.AttachResponse(
                registered=worker_pb2.Registered(pipeline_depth=self._pipeline_depth)
            )
        )
        return port, self._driver.attach(spec, port)

    async def _read_results(
        self, requests: _Requests, port: StreamPort, worker: AttachedWorker
    ) -> None:
        """Feed the worker's messages to the driver until its side of the stream ends."""
        try:
            async for request in requests:
                self._take(request, worker)
            port.close()
        except AptServeError as error:
            _log.warning("worker refused", worker_id=worker.spec.worker_id, error=str(error))
            port.cut(error)
        except Exception:
            _log.exception("reading a worker failed", worker_id=worker.spec.worker_id)
            port.cut(InternalError(INTERNAL_TEXT))

    def _take(self, request: worker_pb2.AttachRequest, worker: AttachedWorker) -> None:
        match request.WhichOneof("message"):
            case "step_result":
                self._driver.apply(worker, wire.step_result_from_proto(request.step_result))
            case "leaving":
                _log.info("worker leaves", worker_id=worker.spec.worker_id)
                self._driver.drain_worker(worker)
            case other:
                raise ProtocolError(f"expected a step result or leaving, got {other}")


async def _read_register(requests: _Requests) -> worker_pb2.Register:
    try:
        async with asyncio.timeout(_REGISTER_TIMEOUT_SECONDS):
            request = await anext(requests)
    except TimeoutError:
        raise DeadlineExceededError(f"no Register within {_REGISTER_TIMEOUT_SECONDS:g} s") from None
    except StopAsyncIteration:
        raise InvalidArgumentError("register", "must be the first message") from None
    if request.WhichOneof("message") != "register":
        raise InvalidArgumentError("register", "must be the first message")
    return request.register
