"""Asks a scheduler over gRPC whether it serves and who is attached."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from aptserve._wire import status_from_proto
from aptserve.types import Status
from aptserve.v1 import admin_pb2, admin_pb2_grpc

TIMEOUT_SECONDS = 2.0

_CHANNEL_OPTIONS = (
    # A scheduler that has just come up must be seen at once, not after gRPC's usual second.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a scheduler answered."""

    serving: bool
    status: Status

    @property
    def worker_ids(self) -> frozenset[str]:
        """Names of the attached workers."""
        return frozenset(worker.worker_id for worker in self.status.workers)


class Probe:
    """One channel to a scheduler, for as many looks as needed; use as an async context manager."""

    def __init__(self, address: str, api_key: str | None) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()

    async def __aenter__(self) -> Probe:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def look(self) -> Snapshot | None:
        """The present state; ``None`` while nothing answers."""
        try:
            health = await self._call(
                health_pb2_grpc.HealthStub(self._channel).Check, health_pb2.HealthCheckRequest()
            )
            status = await self._call(
                admin_pb2_grpc.AdminServiceStub(self._channel).GetStatus,
                admin_pb2.GetStatusRequest(),
            )
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                return None
            raise
        return Snapshot(
            health.status == health_pb2.HealthCheckResponse.SERVING, status_from_proto(status)
        )

    async def drain(self, timeout_seconds: float) -> None:
        """Refuse new requests and wait for those accepted; what fails ends the wait early."""
        request = admin_pb2.DrainRequest()
        request.timeout.FromNanoseconds(int(timeout_seconds * 1e9))
        # A scheduler that does not answer has no requests to wait for.
        with contextlib.suppress(grpc.aio.AioRpcError):
            await self._call(
                admin_pb2_grpc.AdminServiceStub(self._channel).Drain,
                request,
                timeout_seconds + TIMEOUT_SECONDS,
            )

    async def _call(
        self, method: Any, request: Message, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> Any:
        return await method(request, timeout=timeout_seconds, metadata=self._metadata)
