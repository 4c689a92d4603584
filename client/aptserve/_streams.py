"""Streams of the synchronous client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import grpc

from aptserve import _wire
from aptserve._base import map_error
from aptserve._generation import Generation
from aptserve.errors import AptServeError, CancelledError
from aptserve.types import Chunk, Completion, PlanReport
from aptserve.v1 import inference_pb2

_OpenStream = Callable[[inference_pb2.GenerateRequest, float | None], Any]


class GenerateStream:
    """Chunks of one answer, as they come; see :meth:`Client.generate`.

    An iterator for one thread and a context manager. :meth:`cancel` may be called from any thread;
    leaving the context and dropping the object cancel as well.
    """

    def __init__(self, generation: Generation, open_stream: _OpenStream) -> None:
        self._generation = generation
        self._open_stream = open_stream
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        """Held while ``_call`` is replaced, so that a cancel finds the new one."""
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
        """End the request; a thread that reads the stream gets :class:`CancelledError`."""
        self._cancelled.set()
        with self._lock:
            self._call.cancel()

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        if self._is_over:
            raise StopIteration
        try:
            return self._next()
        except BaseException:
            self._is_over = True
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        if hasattr(self, "_call"):
            self._call.cancel()

    def _next(self) -> Chunk:
        while True:
            try:
                response = next(self._call)
            except StopIteration:
                self._generation.on_end()
                raise
            except grpc.RpcError as error:
                if self._generation.result is not None:  # the answer is whole all the same
                    raise StopIteration from None
                self._resume(map_error(error))
                continue
            chunk = self._generation.fold(response)
            if chunk is not None:
                return chunk

    def _resume(self, error: AptServeError) -> None:
        delay = self._generation.on_error(error, time.monotonic())
        self._cancelled.wait(delay)
        with self._lock:
            if self._cancelled.is_set():
                raise CancelledError("the stream was cancelled")
            self._call = self._open()

    def _open(self) -> Any:
        timeout = self._generation.timeout_seconds(time.monotonic())
        return self._open_stream(self._generation.next_request(), timeout)


class PlanStream:
    """Plans as they are sent; see :meth:`Client.watch_plans`. An iterator and context manager."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def cancel(self) -> None:
        """Stop watching; may be called from any thread and ends the iteration."""
        self._call.cancel()

    def __iter__(self) -> Iterator[PlanReport]:
        return self

    def __next__(self) -> PlanReport:
        try:
            return _wire.plan_from_proto(next(self._call))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.CANCELLED:
                raise StopIteration from None
            raise map_error(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        self._call.cancel()
