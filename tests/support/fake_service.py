"""A service for client tests: real gRPC on loopback, scripted answers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from aptserve.errors import AptServeError, to_status
from aptserve.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    types_pb2,
)

Generate = Callable[[inference_pb2.GenerateRequest, Any], Iterator[inference_pb2.GenerateResponse]]
ANSWER = "the answer"
WAIT_SECONDS = 20.0


def started(request_id: str = "made-up", num_prompt_tokens: int = 3) -> Any:
    """A Started event."""
    return inference_pb2.GenerateResponse(
        started=inference_pb2.Started(
            request_id=request_id, model="fake", num_prompt_tokens=num_prompt_tokens
        )
    )


def chunk(text: str, *, logprobs: Sequence[types_pb2.PositionLogprobs] = ()) -> Any:
    """A TokenChunk whose tokens are the bytes of its text."""
    return inference_pb2.GenerateResponse(
        token_chunk=inference_pb2.TokenChunk(
            token_ids=list(text.encode()), text=text, logprobs=logprobs
        )
    )


def finished(
    num_output_tokens: int = 0,
    reason: types_pb2.FinishReason.ValueType = types_pb2.FINISH_REASON_LENGTH,
    **fields: Any,
) -> Any:
    """A Finished event."""
    usage = inference_pb2.Usage(num_prompt_tokens=3, num_output_tokens=num_output_tokens)
    return inference_pb2.GenerateResponse(
        finished=inference_pb2.Finished(finish_reason=reason, usage=usage, **fields)
    )


def answer(
    text: str = ANSWER, *, break_after: int | None = None, error: AptServeError | None = None
) -> Generate:
    """Stream ``text`` letter by letter, going on after what the request brings along.

    With ``error`` the stream fails after ``break_after`` letters, or at its end.
    """

    def generate(request: inference_pb2.GenerateRequest, context: Any) -> Iterator[Any]:
        yield started(request.request_id or "made-up")
        num_resumed = len(request.resume_token_ids)
        assert bytes(request.resume_token_ids).decode() == text[:num_resumed]
        for index, letter in enumerate(text[num_resumed:]):
            if index == break_after:
                break
            yield chunk(letter)
        if error is not None:
            context.abort_with_status(to_status(error))
        yield finished(len(text))

    return generate


def fail(error: AptServeError) -> Generate:
    """Refuse the request."""

    def generate(request: inference_pb2.GenerateRequest, context: Any) -> Iterator[Any]:
        context.abort_with_status(to_status(error))
        yield started()

    return generate


class FakeService(inference_pb2_grpc.InferenceServiceServicer, admin_pb2_grpc.AdminServiceServicer):
    """Answers each call with what was scripted for it, and remembers what it was asked."""

    def __init__(self) -> None:
        self.address = ""
        self.requests: list[Any] = []
        self.metadata: list[dict[str, str]] = []
        self.time_remaining: list[float | None] = []
        self.scripts: queue.SimpleQueue[Generate] = queue.SimpleQueue()
        self.num_ended = threading.Semaphore(0)
        """Released each time a Generate call has ended, however it ended."""
        self.responses: dict[str, Any] = {}
        """Answer of each unary method by name: a message, or an error to raise."""
        self.plans: list[admin_pb2.WatchPlansResponse] = []

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.address.rpartition(":")[2])

    def script(self, *behaviours: Generate) -> None:
        """What the next Generate calls do, in order; without one they stream ``ANSWER``."""
        for behaviour in behaviours:
            self.scripts.put(behaviour)

    def wait_ended(self) -> None:
        """Wait until one more Generate call has ended."""
        assert self.num_ended.acquire(timeout=WAIT_SECONDS)

    def Generate(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        self._note(request, context)
        context.add_callback(self.num_ended.release)
        try:
            behaviour = self.scripts.get_nowait()
        except queue.Empty:
            behaviour = answer()
        yield from behaviour(request, context)

    def Abort(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._answer("Abort", request, context)

    def GetModel(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._answer("GetModel", request, context)

    def CountTokens(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._answer("CountTokens", request, context)

    def GetStatus(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._answer("GetStatus", request, context)

    def Drain(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._answer("Drain", request, context)

    def WatchPlans(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        self._note(request, context)
        ended = threading.Event()
        context.add_callback(ended.set)
        yield from self.plans
        ended.wait(WAIT_SECONDS)

    def _answer(self, method: str, request: Any, context: Any) -> Any:
        self._note(request, context)
        response = self.responses[method]
        if isinstance(response, AptServeError):
            context.abort_with_status(to_status(response))
        return response

    def _note(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.time_remaining.append(context.time_remaining())


@contextmanager
def fake_service(port: int = 0) -> Iterator[FakeService]:
    """A service on a loopback port."""
    service = FakeService()
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(service, server)
    service.address = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    server.start()
    try:
        yield service
    finally:
        server.stop(None).wait(WAIT_SECONDS)
