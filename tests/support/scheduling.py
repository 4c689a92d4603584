"""A real scheduler service on a free port, with real stubs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from aptserve.v1 import (
    admin_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    types_pb2,
    worker_pb2,
    worker_pb2_grpc,
)
from aptserve_scheduler.config import load_settings
from aptserve_scheduler.service import SchedulerService
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.eventually import eventually

CALL_SECONDS = 10.0
"""Deadline of every call that is not about deadlines."""
_BIG = 64 << 20


@dataclass
class Serving:
    """A running service and stubs that talk to it over loopback."""

    service: SchedulerService
    channel: grpc.aio.Channel
    inference: Any = field(init=False)
    admin: Any = field(init=False)
    gateway: Any = field(init=False)
    health: Any = field(init=False)

    def __post_init__(self) -> None:
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(self.channel)
        self.gateway = worker_pb2_grpc.WorkerGatewayStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    @property
    def address(self) -> str:
        return self.service.address

    def generate(self, *, timeout: float = CALL_SECONDS, **fields: Any) -> Any:
        """A Generate call; prompt tokens 97, 98, 99 unless the fields say otherwise."""
        if "text" not in fields and "token_ids" not in fields:
            fields["token_ids"] = types_pb2.TokenIds(ids=b"abc")
        request = inference_pb2.GenerateRequest(**fields)
        return self.inference.Generate(request, timeout=timeout)

    async def answer(self, **fields: Any) -> Answer:
        """The whole answer of a Generate call."""
        return await collect(self.generate(**fields))

    async def is_serving(self, service: str = "") -> bool:
        """What health says."""
        request = health_pb2.HealthCheckRequest(service=service)
        reply = await self.health.Check(request, timeout=CALL_SECONDS)
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    async def all_is_free(self) -> None:
        """Wait until no request is left and no worker's unit is in use."""

        def is_empty() -> bool:
            snapshot = self.service.driver.snapshot()
            used = sum(worker.num_used_units for worker in snapshot.workers)
            return self.service.driver.num_pending == 0 and used == 0

        await eventually(is_empty, message="all requests ended and all units free")


@dataclass
class Answer:
    """The events of a stream, sorted."""

    started: inference_pb2.Started
    chunks: list[inference_pb2.TokenChunk]
    finished: inference_pb2.Finished

    @property
    def token_ids(self) -> list[int]:
        return [t for chunk in self.chunks for t in chunk.token_ids]

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)


async def collect(call: Any) -> Answer:
    """Read a stream to its end and check its shape: started, chunks, exactly one finished."""
    events = [event async for event in call]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started"
    assert kinds[-1] == "finished"
    assert set(kinds[1:-1]) <= {"token_chunk"}
    return Answer(events[0].started, [e.token_chunk for e in events[1:-1]], events[-1].finished)


async def read_event(call: Any, kind: str) -> Any:
    """The next event, which must be of this kind."""
    event = await call.read()
    assert event is not grpc.aio.EOF
    assert event.WhichOneof("event") == kind
    return getattr(event, kind)


async def read_to_end(call: Any) -> list[inference_pb2.GenerateResponse]:
    """All events to come, of a call that has been read from before."""
    events = []
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)
    return events


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Serving]:
    """A started service with fields of its settings; stopped without grace at the end."""
    options = [("grpc.max_receive_message_length", _BIG), ("grpc.max_send_message_length", _BIG)]
    settings = {"listen": "127.0.0.1:0", "policy": "fcfs", **settings}
    service = SchedulerService(load_settings(**settings))
    await service.start()
    try:
        async with grpc.aio.insecure_channel(service.address, options=options) as channel:
            yield Serving(service, channel)
    finally:
        await service.stop(0.0)


def make_register(**fields: Any) -> worker_pb2.Register:
    """What a small worker of model "fake" says first; fields replace whole parts of it."""
    values: dict[str, Any] = {
        "protocol_version": 1,
        "worker_id": "scripted",
        "model": worker_pb2.ModelInfo(
            name="fake", fingerprint="f1", architecture="A", context_length=64, vocab_size=257
        ),
        "pool": worker_pb2.PoolInfo(
            num_units=64,
            block_size=4,
            unit_bytes=1024,
            tiers=[worker_pb2.TierInfo(tier=types_pb2.CACHE_TIER_KV, units_per_block=2)],
        ),
        "calibration": worker_pb2.Calibration(base_seconds=1e-3),
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "device": "script",
        "resident_bytes": 1 << 20,
    }
    return worker_pb2.Register(**{**values, **fields})


class ScriptedWorker:
    """A worker whose every message the test writes itself."""

    def __init__(self, call: Any) -> None:
        self.call = call

    @classmethod
    async def attach(cls, serving: Serving, **fields: Any) -> ScriptedWorker:
        """Register; the answer is the test's to read."""
        worker = cls(serving.gateway.Attach(timeout=60.0))
        await worker.send(register=make_register(**fields))
        return worker

    async def send(self, **fields: Any) -> None:
        """Write one message."""
        await self.call.write(worker_pb2.AttachRequest(**fields))

    async def read(self, kind: str) -> Any:
        """The next message, which must be of this kind."""
        async with asyncio.timeout(CALL_SECONDS):
            message = await self.call.read()
        assert message is not grpc.aio.EOF
        assert message.WhichOneof("message") == kind
        return getattr(message, kind)

    async def answer(self, plan: worker_pb2.BatchPlan, token_id: int, **fields: Any) -> None:
        """Answer a plan with one token for each of its sequences."""
        outputs = [
            worker_pb2.SequenceOutput(sequence_id=s.sequence_id, token_ids=[token_id])
            for s in plan.scheduled
        ]
        result = {"plan_id": plan.plan_id, "outputs": outputs, "step_seconds": 0.001, **fields}
        await self.send(step_result=worker_pb2.StepResult(**result))
