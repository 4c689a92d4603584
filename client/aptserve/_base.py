"""What the sync and the async client have in common: everything but I/O."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import grpc

from aptserve import _wire
from aptserve._channel import DEFAULT_CALL_TIMEOUT_SECONDS, Target, make_target
from aptserve._generation import Generation, ResumePolicy
from aptserve._request import SamplingOptions, build_request, check_text
from aptserve.errors import AptServeError, InvalidArgumentError, from_rpc_error
from aptserve.hints import Hints
from aptserve.sampling import SamplingParams
from aptserve.types import Objectives
from aptserve.v1 import admin_pb2, inference_pb2


class ClientBase:
    """Settings of a client and the messages that it sends."""

    def __init__(
        self,
        address: str | None = None,
        *,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        timeout: float = DEFAULT_CALL_TIMEOUT_SECONDS,
        resume: bool = True,
        resume_timeout: float = 30.0,
        channel_options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        """Nothing is sent yet.

        ``address``: HOST:PORT, else ``APTSERVE_ADDRESS``, else 127.0.0.1:50051. ``api_key``: else
        ``APTSERVE_API_KEY``. ``credentials``: TLS, as :func:`grpc.ssl_channel_credentials` makes
        them; else the connection is in plain text. ``timeout``: seconds for calls that answer once.
        ``resume``: go on with a new stream where one breaks because the service went away, trying
        for ``resume_timeout`` seconds without a new token. ``channel_options``: gRPC channel
        arguments, which win over the client's own.
        """
        _check_seconds("timeout", timeout)
        _check_seconds("resume_timeout", resume_timeout)
        self._target: Target = make_target(address, api_key, credentials, channel_options)
        self._timeout = timeout
        self._policy = ResumePolicy(resume, resume_timeout)
        self._set_up()

    @property
    def address(self) -> str:
        """Where the service is."""
        return self._target.address

    def _set_up(self) -> None:
        """What a client has besides its settings."""
        raise NotImplementedError

    def _new_generation(
        self,
        prompt: str | None,
        options: SamplingOptions,
        *,
        token_ids: Sequence[int] | None,
        sampling: SamplingParams | None,
        objectives: Objectives | None,
        request_id: str | None,
        model: str | None,
        timeout: float | None,
        resume_token_ids: Sequence[int] | None,
        hints: Hints,
    ) -> Generation:
        if timeout is not None:
            _check_seconds("timeout", timeout)
        request = build_request(
            prompt,
            token_ids=token_ids,
            sampling=sampling,
            options=options,
            objectives=objectives,
            request_id=request_id,
            model=model,
            resume_token_ids=resume_token_ids,
            hints=hints,
        )
        deadline = None if timeout is None else time.monotonic() + timeout
        return Generation(request, self._policy, deadline=deadline)


def abort_request(request_ids: Sequence[str]) -> inference_pb2.AbortRequest:
    """At least one id is required."""
    if not request_ids:
        raise InvalidArgumentError("request_ids", "must have at least one entry")
    return inference_pb2.AbortRequest(request_ids=request_ids)


def count_tokens_request(text: str, model: str | None) -> inference_pb2.CountTokensRequest:
    """The text must be valid and small enough."""
    check_text("text", text)
    return inference_pb2.CountTokensRequest(text=text, model=model or "")


def drain_request(timeout: float) -> admin_pb2.DrainRequest:
    """``timeout`` is in seconds."""
    _check_seconds("timeout", timeout)
    return admin_pb2.DrainRequest(timeout=_wire.to_duration(timeout))


def map_error(error: grpc.RpcError) -> AptServeError:
    """The error of our tree that a failed call stands for, caused by it."""
    mapped = from_rpc_error(error)
    mapped.__cause__ = error
    return mapped


def _check_seconds(field: str, seconds: float) -> None:
    if not (seconds > 0 and math.isfinite(seconds)):
        raise InvalidArgumentError(field, "must be more than 0 and finite")
