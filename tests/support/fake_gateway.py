"""A scheduler side of the worker protocol that a test plays by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from aptserve.v1 import types_pb2, worker_pb2, worker_pb2_grpc

TIMEOUT_SECONDS = 20.0


class GatewayStream:
    """One worker's stream, seen from the scheduler."""

    def __init__(self, context: Any) -> None:
        self.metadata: dict[str, str] = dict(context.invocation_metadata() or ())
        self.incoming: asyncio.Queue[worker_pb2.AttachRequest | None] = asyncio.Queue()
        self.outgoing: asyncio.Queue[worker_pb2.AttachResponse | grpc.StatusCode | None] = (
            asyncio.Queue()
        )
        self.ended = asyncio.Event()

    async def receive(self) -> worker_pb2.AttachRequest:
        """The worker's next message; fails the test when the stream has ended."""
        message = await asyncio.wait_for(self.incoming.get(), TIMEOUT_SECONDS)
        assert message is not None, "the worker closed the stream"
        return message

    async def result(self) -> worker_pb2.StepResult:
        """The worker's next message, which must be a result."""
        message = await self.receive()
        assert message.WhichOneof("message") == "step_result", message
        return message.step_result

    async def wait_ended(self) -> None:
        """Wait until the stream has ended, by whoever."""
        await asyncio.wait_for(self.ended.wait(), TIMEOUT_SECONDS)

    def registered(self, pipeline_depth: int = 2) -> None:
        """Accept the worker."""
        registered = worker_pb2.Registered(pipeline_depth=pipeline_depth)
        self.outgoing.put_nowait(worker_pb2.AttachResponse(registered=registered))

    def plan(self, plan: worker_pb2.BatchPlan) -> None:
        """Send a plan."""
        self.outgoing.put_nowait(worker_pb2.AttachResponse(batch_plan=plan))

    def release(self, *sequence_ids: int) -> None:
        """Send a Release."""
        release = worker_pb2.Release(sequence_ids=sequence_ids)
        self.outgoing.put_nowait(worker_pb2.AttachResponse(release=release))

    def detached(self) -> None:
        """Let the worker go."""
        self.outgoing.put_nowait(worker_pb2.AttachResponse(detached=worker_pb2.Detached()))

    def end(self, code: grpc.StatusCode | None = None) -> None:
        """End the stream, with a status or normally."""
        self.outgoing.put_nowait(code)


class FakeGateway(worker_pb2_grpc.WorkerGatewayServicer):
    """Hands every worker that dials in to the test."""

    def __init__(self) -> None:
        self.address = ""
        self._streams: asyncio.Queue[GatewayStream] = asyncio.Queue()

    async def accept(self, *, register: bool = True) -> GatewayStream:
        """The next stream, after its Register was answered unless ``register=False``."""
        stream = await asyncio.wait_for(self._streams.get(), TIMEOUT_SECONDS)
        if register:
            assert (await stream.receive()).WhichOneof("message") == "register"
            stream.registered()
        return stream

    async def refuse(self, status: grpc.StatusCode) -> None:
        """Read the next stream's Register and end it with a status."""
        stream = await self.accept(register=False)
        await stream.receive()
        stream.end(status)

    async def refuse_all_unread(self, status: grpc.StatusCode) -> None:
        """End every stream at once, whatever it sends; for a task of its own."""
        while True:
            (await self._streams.get()).end(status)

    async def Attach(  # noqa: N802
        self, request_iterator: Any, context: Any
    ) -> AsyncIterator[worker_pb2.AttachResponse]:
        stream = GatewayStream(context)
        self._streams.put_nowait(stream)
        reader = asyncio.create_task(_read(request_iterator, stream))
        try:
            while (message := await stream.outgoing.get()) is not None:
                if isinstance(message, grpc.StatusCode):
                    await context.abort(message, "as scripted")
                yield message
        finally:
            reader.cancel()
            stream.ended.set()


async def _read(request_iterator: Any, stream: GatewayStream) -> None:
    async for message in request_iterator:
        stream.incoming.put_nowait(message)
    stream.incoming.put_nowait(None)
    stream.end()


@asynccontextmanager
async def fake_gateway(port: int = 0) -> AsyncIterator[FakeGateway]:
    """A gateway on a loopback port."""
    gateway = FakeGateway()
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    worker_pb2_grpc.add_WorkerGatewayServicer_to_server(gateway, server)  # type: ignore[no-untyped-call]
    gateway.address = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    await server.start()
    try:
        yield gateway
    finally:
        await server.stop(None)


def make_plan(
    plan_id: int,
    *,
    new: Sequence[worker_pb2.NewSequence] = (),
    scheduled: Sequence[tuple[int, int, int]] = (),
    release: Sequence[int] = (),
    promote: Sequence[int] = (),
) -> worker_pb2.BatchPlan:
    """A plan; ``scheduled`` are (sequence id, computed tokens, new tokens)."""
    return worker_pb2.BatchPlan(
        plan_id=plan_id,
        release_sequence_ids=release,
        promote_sequence_ids=promote,
        new_sequences=new,
        scheduled=[
            worker_pb2.ScheduledSequence(
                sequence_id=s, num_computed_tokens=computed, num_new_tokens=new_tokens
            )
            for s, computed, new_tokens in scheduled
        ],
    )


def make_sequence(
    sequence_id: int = 1,
    prompt: Sequence[int] = (104, 105),
    *,
    output: Sequence[int] = (),
    tier: types_pb2.CacheTier.ValueType = types_pb2.CACHE_TIER_KV,
    max_tokens: int = 100,
    **sampling: Any,
) -> worker_pb2.NewSequence:
    """A new sequence of a request named after its id."""
    return worker_pb2.NewSequence(
        sequence_id=sequence_id,
        request_id=f"request-{sequence_id}",
        token_ids=[*prompt, *output],
        num_prompt_tokens=len(prompt),
        tier=tier,
        sampling=types_pb2.SamplingParams(max_tokens=max_tokens, seed=0, **sampling),
    )
