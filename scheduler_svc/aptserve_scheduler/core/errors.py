"""What can go wrong in the scheduler core; one tree, translated to gRPC statuses elsewhere."""

from __future__ import annotations


class SchedulerError(Exception):
    """Base of every error the core raises on purpose."""


class DuplicateRequest(SchedulerError):  # noqa: N818 - named for what happened, as gRPC does
    """A live request has this id already."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"request id {request_id!r} is in use")
        self.request_id = request_id


class QueueFull(SchedulerError):  # noqa: N818
    """The waiting queue is at its bound; try again after ``retry_after_seconds``."""

    def __init__(self, max_waiting: int, retry_after_seconds: float) -> None:
        super().__init__(f"the queue is full: {max_waiting} requests wait")
        self.retry_after_seconds = retry_after_seconds


class RequestTooLarge(SchedulerError):  # noqa: N818
    """Prompt and output together fit no attached worker's pool, even when it is empty."""


class UnknownWorker(SchedulerError):  # noqa: N818
    """No worker of this id is attached."""

    def __init__(self, worker_id: str) -> None:
        super().__init__(f"no worker {worker_id!r} is attached")


class ProtocolViolation(SchedulerError):  # noqa: N818
    """A worker's answer disagrees with what it was told; the worker must be removed."""


class PolicyError(SchedulerError):
    """A policy's decision breaks a limit; a fault of this software, not of any request."""


class IntegrityError(SchedulerError):
    """A recount disagrees with the books; a fault of this software."""
