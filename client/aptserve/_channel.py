"""How a client reaches the service: address, credentials, limits, retries."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc

DEFAULT_ADDRESS = "127.0.0.1:50051"
ADDRESS_VARIABLE = "APTSERVE_ADDRESS"
API_KEY_VARIABLE = "APTSERVE_API_KEY"

DEFAULT_CALL_TIMEOUT_SECONDS = 30.0
"""Deadline of calls that answer once."""

DRAIN_MARGIN_SECONDS = 10.0
"""The deadline of a drain lies so much later than the drain's own time-out, which shall win."""

SERVICE_CONFIG: str = json.dumps(
    {
        "methodConfig": [
            {
                "name": [
                    {"service": "aptserve.v1.InferenceService"},
                    {"service": "aptserve.v1.AdminService"},
                ],
                # gRPC retries a stream only until its first message has arrived.
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "1s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)

_OPTIONS: tuple[tuple[str, Any], ...] = (
    # CountTokens answers a 4 MiB text with up to 4 Mi token ids of 5 bytes.
    ("grpc.max_receive_message_length", 32 << 20),
    # A prompt is at most 4 MiB of text; 16 MiB are 3 million token ids.
    ("grpc.max_send_message_length", 16 << 20),
    # Larger requests would not be retried; the default is 256 KiB.
    ("grpc.per_rpc_retry_buffer_size", 16 << 20),
    ("grpc.service_config", SERVICE_CONFIG),
    # With calls open, a silent service is noticed after at most 5 s + 4 s. The service allows pings
    # every second. The keepalive time-out does not cover gRPC's bandwidth probes, which hold
    # keepalive pings back; the ping time-out (60 s by default) covers both.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 4_000),
    ("grpc.http2.ping_timeout_ms", 4_000),
    ("grpc.http2.max_pings_without_data", 0),
    # The default first pause of 1 s would cost every resumed stream a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


@dataclass(frozen=True, slots=True)
class Target:
    """Where and how to connect. ``options`` are gRPC channel arguments and win over ours."""

    address: str
    api_key: str | None
    credentials: grpc.ChannelCredentials | None
    options: tuple[tuple[str, Any], ...]

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Metadata of every call."""
        if self.api_key is None:
            return ()
        return (("authorization", f"Bearer {self.api_key}"),)


def make_target(
    address: str | None,
    api_key: str | None,
    credentials: grpc.ChannelCredentials | None,
    options: Sequence[tuple[str, Any]],
) -> Target:
    """Arguments first, then the environment, then the defaults."""
    merged = dict(_OPTIONS) | dict(options)
    return Target(
        address=address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS,
        api_key=api_key or os.environ.get(API_KEY_VARIABLE) or None,
        credentials=credentials,
        options=tuple(merged.items()),
    )
