"""What every call goes through: credentials, bytes to message, errors to status."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from aptserve.errors import (
    AptServeError,
    InternalError,
    InvalidArgumentError,
    UnauthenticatedError,
    to_status,
)
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError

from aptserve_scheduler.api.malformed import find_invalid_string
from aptserve_scheduler.delivery import INTERNAL_TEXT

_log = structlog.stdlib.get_logger(__name__)
_BEARER = "bearer "
_MAX_REQUEST_BYTES = 16 << 20
"""Above the largest text (4 MiB) and the token ids of any context, so that the checks of the fields
speak first; parsing more than this would hold up everybody."""
_Behaviour = Callable[[Any, Any], Any]
_Parse = Callable[[bytes], Any]


@dataclass(frozen=True, slots=True)
class _Malformed:
    """Stands for a message that does not parse until the call can be answered."""

    error: InvalidArgumentError


class CallGuard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """The one place where calls are let in and where errors become RPC statuses.

    ``tokens`` maps a service's full name to the bearer token that its callers must show; services
    not in it are open. Errors of the :class:`AptServeError` tree become their status, anything else
    is logged and answered with INTERNAL and a fixed text. Messages over ``max_bytes`` of a service,
    by default 16 MiB, are not parsed.
    """

    def __init__(self, tokens: Mapping[str, str], max_bytes: Mapping[str, int]) -> None:
        self._tokens = dict(tokens)
        self._max_bytes = dict(max_bytes)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """The handler of a call with the guard around it."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        service, _, method = handler_call_details.method.lstrip("/").partition("/")
        denied = self._check_credentials(service, handler_call_details.invocation_metadata)
        max_bytes = self._max_bytes.get(service, _MAX_REQUEST_BYTES)
        parse = _parser(handler.request_deserializer, _input_type(service, method), max_bytes)
        return _wrap(handler, parse, denied)

    def _check_credentials(self, service: str, metadata: Any) -> UnauthenticatedError | None:
        expected = self._tokens.get(service)
        if expected is None:
            return None
        for key, value in metadata or ():
            if key == "authorization" and isinstance(value, str) and _is_bearer(value, expected):
                return None
        return UnauthenticatedError("metadata 'authorization' must be 'Bearer' and the right token")


def _is_bearer(value: str, token: str) -> bool:
    scheme, credentials = value[: len(_BEARER)], value[len(_BEARER) :]
    return scheme.lower() == _BEARER and hmac.compare_digest(credentials.encode(), token.encode())


def _input_type(service: str, method: str) -> Descriptor:
    found = descriptor_pool.Default().FindServiceByName(service)
    return found.methods_by_name[method].input_type


def _wrap(
    handler: grpc.RpcMethodHandler, parse: _Parse, denied: AptServeError | None
) -> grpc.RpcMethodHandler:
    codec = {
        "request_deserializer": parse,
        "response_serializer": handler.response_serializer,
    }
    if handler.unary_unary is not None:
        guarded = _guard_unary(handler.unary_unary, denied)
        return grpc.unary_unary_rpc_method_handler(guarded, **codec)
    if handler.unary_stream is not None:
        guarded = _guard_stream(handler.unary_stream, denied)
        return grpc.unary_stream_rpc_method_handler(guarded, **codec)
    if handler.stream_stream is not None:
        guarded = _guard_stream(handler.stream_stream, denied)
        return grpc.stream_stream_rpc_method_handler(guarded, **codec)
    guarded = _guard_unary(handler.stream_unary, denied)
    return grpc.stream_unary_rpc_method_handler(guarded, **codec)


def _parser(deserialize: _Parse, input_type: Descriptor, max_bytes: int) -> _Parse:
    """gRPC's own answer to a message that does not parse is INTERNAL, without the field."""

    def parse(data: bytes) -> Any:
        if len(data) > max_bytes:
            text = f"has {len(data)} bytes, at most {max_bytes}"
            return _Malformed(InvalidArgumentError("request", text))
        try:
            return deserialize(data)
        except DecodeError:
            field = find_invalid_string(data, input_type)
            if field is not None:
                return _Malformed(InvalidArgumentError(field, "is not valid UTF-8"))
            text = f"is not a {input_type.full_name} message"
            return _Malformed(InvalidArgumentError("request", text))

    return parse


def _guard_unary(behaviour: _Behaviour, denied: AptServeError | None) -> _Behaviour:
    async def call(request: Any, context: Any) -> Any:
        try:
            return await behaviour(_admit(request, denied), context)
        except Exception as error:
            await _abort(context, error)

    return call


def _guard_stream(behaviour: _Behaviour, denied: AptServeError | None) -> _Behaviour:
    async def call(request: Any, context: Any) -> None:
        try:
            result = behaviour(_admit(request, denied), context)
            if not hasattr(result, "__aiter__"):
                await result
                return
            # Closing the generator is what frees a request whose client has gone.
            async with aclosing(result) as responses:
                async for response in responses:
                    await context.write(response)
        except Exception as error:
            await _abort(context, error)

    return call


def _admit(request: Any, denied: AptServeError | None) -> Any:
    """The request, or the stream of requests, if it may be looked at."""
    if denied is not None:
        raise denied
    if isinstance(request, _Malformed):
        raise request.error
    return _admit_each(request) if hasattr(request, "__aiter__") else request


async def _admit_each(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        if isinstance(request, _Malformed):
            raise request.error
        yield request


async def _abort(context: Any, error: Exception) -> None:
    """End the call with the status of the error. Always raises."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, AptServeError):
        await context.abort_with_status(to_status(error))
    if isinstance(error, grpc.aio.UsageError | asyncio.InvalidStateError):
        # Writing to a call that the client has just left; there is nobody to answer.
        _log.debug("call ended while it was answered", error=str(error))
        raise error
    _log.error("call failed", exc_info=error)
    await context.abort_with_status(to_status(InternalError(INTERNAL_TEXT)))
