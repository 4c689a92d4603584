"""Streams of the asynchronous client."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, NoReturn, Self

import grpc
import grpc.aio

from aptserve import _wire
from aptserve._base import map_error
from aptserve._generation import Generation
from aptserve.errors import AptServeError, CancelledError
from aptserve.types import Chunk, Completion, PlanReport
from aptserve.v1 import inference_pb2

_OpenStream = Callable[[inference_pb2.GenerateRequest, float | None], Any]


class AsyncGenerateStream:
    """Chunks of one answer, as they come; see :meth:`AsyncClient.generate`.

    An async iterator for one task and an async context manager. Leaving the context, cancelling
    the reading task and dropping the object cancel the request.
    """

    def __init__(self, generation: Generation, open_stream: _OpenStream) -> None:
        self._generation = generation
        self._open_stream = open_stream
        self._cancelled = asyncio.Event()
        self._is_over = False
        self._call = self._open()

    @property
    def request_id(self) -> str | None:
        """The caller's, or the service's, known once the first event has come."""
        return self._generation.request_id

    @property
    def text(self) -> str:
        """The text so far."""
        return self._generation.text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens so far."""
        return self._generation.token_ids

    @property
    def num_resumes(self) -> int:
        """How often a new stream was opened because the one before broke."""
        return self._generation.num_resumes

    @property
    def result(self) -> Completion:
        """The whole answer; ``RuntimeError`` before the last chunk was read."""
        if self._generation.result is None:
            raise RuntimeError("the stream has not ended yet")
        return self._generation.result

    def cancel(self) -> None:
        """End the request; a task that reads the stream gets :class:`CancelledError`."""
        self._cancelled.set()
        self._call.cancel()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        if self._is_over:
            raise StopAsyncIteration
        try:
            return await self._next()
        except BaseException:
            self._is_over = True
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        _cancel_dropped(getattr(self, "_call", None))

    async def _next(self) -> Chunk:
        while True:
            try:
                response = await self._call.read()
            except asyncio.CancelledError:
                self._on_cancelled()
            except grpc.RpcError as error:
                if self._generation.result is not None:  # the answer is whole all the same
                    raise StopAsyncIteration from None
                await self._resume(map_error(error))
                continue
            if response is grpc.aio.EOF:
                self._generation.on_end()
                raise StopAsyncIteration
            chunk = self._generation.fold(response)
            if chunk is not None:
                return chunk

    def _on_cancelled(self) -> NoReturn:
        """gRPC reports a cancelled call, a closed channel and a cancelled task alike."""
        self._call.cancel()
        if _is_task_cancelled():
            raise
        raise CancelledError("the stream was cancelled") from None

    async def _resume(self, error: AptServeError) -> None:
        delay = self._generation.on_error(error, time.monotonic())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._cancelled.wait(), delay)
        if self._cancelled.is_set():
            raise CancelledError("the stream was cancelled")
        self._call = self._open()

    def _open(self) -> Any:
        timeout = self._generation.timeout_seconds(time.monotonic())
        return self._open_stream(self._generation.next_request(), timeout)


class AsyncPlanStream:
    """Plans as they are sent; see :meth:`AsyncClient.watch_plans`."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def cancel(self) -> None:
        """Stop watching; ends the iteration."""
        self._call.cancel()

    def __aiter__(self) -> AsyncIterator[PlanReport]:
        return self

    async def __anext__(self) -> PlanReport:
        try:
            message = await self._call.read()
        except asyncio.CancelledError:
            if _is_task_cancelled():
                raise
            raise StopAsyncIteration from None
        except grpc.RpcError as error:
            raise map_error(error) from error
        if message is grpc.aio.EOF:
            raise StopAsyncIteration
        return _wire.plan_from_proto(message)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        _cancel_dropped(self._call)


def _is_task_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _cancel_dropped(call: Any) -> None:
    if call is not None:
        # The event loop may have closed before the last reference went; then the call is over.
        with contextlib.suppress(RuntimeError):
            call.cancel()
