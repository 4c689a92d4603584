"""The one exception tree of Apt-Serve, shared by service and client.

The service raises these, one interceptor turns them into a ``google.rpc.Status``
(:func:`to_status`), and the client turns the status back into the same class
(:func:`from_rpc_error`).
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

_DOMAIN = "aptserve"
_M = TypeVar("_M", bound=Message)


class AptServeError(Exception):
    """Base of all errors; ``code`` is its gRPC status, ``reason`` the ``ErrorInfo`` reason."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    reason: ClassVar[str] = "UNKNOWN"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def details(self) -> list[Message]:
        """``google.rpc`` detail messages beside the ``ErrorInfo``."""
        return []


class InvalidArgumentError(AptServeError):
    """A field of the request has a value that cannot be served; ``field`` is its path."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_ARGUMENT"

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description

    def details(self) -> list[Message]:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=self.field, description=self.description
        )
        return [error_details_pb2.BadRequest(field_violations=[violation])]


class NotFoundError(AptServeError):
    """The model or request named does not exist."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "NOT_FOUND"


class AlreadyExistsError(AptServeError):
    """The request id is in use."""

    code = grpc.StatusCode.ALREADY_EXISTS
    reason = "ALREADY_EXISTS"


class ResourceExhaustedError(AptServeError):
    """The queue is full; try again after ``retry_after_seconds``."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"

    def __init__(self, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds

    def details(self) -> list[Message]:
        if self.retry_after_seconds is None:
            return []
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(self.retry_after_seconds * 1e9))
        return [error_details_pb2.RetryInfo(retry_delay=delay)]


class FailedPreconditionError(AptServeError):
    """The service is not in a state that allows the call, such as text without a tokenizer."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "FAILED_PRECONDITION"


class UnavailableError(AptServeError):
    """No worker, draining, or no connection; the same call may succeed later."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "UNAVAILABLE"


class UnauthenticatedError(AptServeError):
    """The API key or join token is missing or wrong."""

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class DeadlineExceededError(AptServeError):
    """The call's deadline passed."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class CancelledError(AptServeError):
    """The call was cancelled."""

    code = grpc.StatusCode.CANCELLED
    reason = "CANCELLED"


class ProtocolError(AptServeError):
    """A peer broke the worker protocol."""

    code = grpc.StatusCode.ABORTED
    reason = "PROTOCOL"


class InternalError(AptServeError):
    """A fault of the service; the cause is in its log under the request id."""

    code = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"


_CLASSES: tuple[type[AptServeError], ...] = (
    NotFoundError,
    AlreadyExistsError,
    FailedPreconditionError,
    UnavailableError,
    UnauthenticatedError,
    DeadlineExceededError,
    CancelledError,
    ProtocolError,
    InternalError,
)
_BY_CODE: dict[grpc.StatusCode, type[AptServeError]] = {c.code: c for c in _CLASSES}


def to_status(error: AptServeError) -> grpc.Status:
    """The RPC status of an error: one ``ErrorInfo`` and the error's own details."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=_DOMAIN)
    status = status_pb2.Status(
        code=getattr(code_pb2, error.code.name),
        message=error.message,
        details=[_pack(m) for m in (info, *error.details())],
    )
    return rpc_status.to_status(status)


def from_rpc_error(error: grpc.RpcError) -> AptServeError:
    """The error that a failed call stands for; details decide, the status code is the fallback."""
    code = error.code()
    message = error.details() or code.name
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # details that contradict the code: not from our service
        status = None
    details = list(status.details) if status is not None else []
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        bad = _unpack(details, error_details_pb2.BadRequest())
        if bad is not None and bad.field_violations:
            return InvalidArgumentError(
                bad.field_violations[0].field, bad.field_violations[0].description
            )
        return InvalidArgumentError("request", message)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        retry = _unpack(details, error_details_pb2.RetryInfo())
        delay = retry.retry_delay.ToNanoseconds() / 1e9 if retry is not None else None
        return ResourceExhaustedError(message, delay)
    return _BY_CODE.get(code, AptServeError)(message)


def _pack(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _unpack(details: list[any_pb2.Any], message: _M) -> _M | None:
    for detail in details:
        if detail.Unpack(message):
            return message
    return None
