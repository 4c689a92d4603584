"""One Generate call from the caller's point of view, however many streams it takes.

Free of I/O: :class:`Generation` folds events into chunks and a result and decides what to do when
a stream breaks. The sync and the async client only open streams, read and wait.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from aptserve import _wire
from aptserve.errors import (
    AlreadyExistsError,
    AptServeError,
    DeadlineExceededError,
    InternalError,
    ResourceExhaustedError,
    UnavailableError,
)
from aptserve.types import Chunk, Completion, PositionLogprobs
from aptserve.v1 import inference_pb2

_FIRST_DELAY_SECONDS = 0.1
_MOST_DELAY_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class ResumePolicy:
    """Whether broken streams are resumed, and how long to try without a new token."""

    enabled: bool = True
    timeout_seconds: float = 30.0


class Generation:
    """State of a Generate call. Times are seconds of one monotonic clock that the caller owns.

    ``deadline`` is when the whole call must have ended, resumed streams included.
    """

    def __init__(
        self,
        request: inference_pb2.GenerateRequest,
        policy: ResumePolicy,
        *,
        deadline: float | None,
    ) -> None:
        self._request = request
        self._policy = policy
        self._deadline = deadline
        self._model = ""
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[PositionLogprobs] = []
        self._started = False
        self._outage_began: float | None = None
        self._num_delays = 0
        self.num_resumes = 0
        self.result: Completion | None = None

    @property
    def request_id(self) -> str | None:
        """The caller's, or the service's once it has accepted the request."""
        return self._request.request_id or None

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._text)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens so far."""
        return tuple(self._token_ids)

    def next_request(self) -> inference_pb2.GenerateRequest:
        """The message that opens the next stream: the caller's, and what was received since."""
        request = inference_pb2.GenerateRequest()
        request.CopyFrom(self._request)
        request.resume_token_ids.extend(self._token_ids)
        return request

    def timeout_seconds(self, now: float) -> float | None:
        """What is left of the call's time; for the next stream's deadline."""
        return None if self._deadline is None else max(0.0, self._deadline - now)

    def fold(self, response: inference_pb2.GenerateResponse) -> Chunk | None:
        """Take an event; the chunk for the caller if it is one."""
        match response.WhichOneof("event"):
            case "started":
                self._start(response.started)
            case "token_chunk":
                return self._take(response.token_chunk)
            case "finished":
                self._finish(response.finished)
            case _:  # an event that a newer service has: nothing that this SDK could use
                pass
        return None

    def on_end(self) -> None:
        """The stream ended without an error; raises when it had no terminal event."""
        if self.result is None:
            raise InternalError("the stream ended without a Finished event")

    def on_error(self, error: AptServeError, now: float) -> float:
        """Seconds to wait before the stream is resumed; raises the error where it is final."""
        if not self._can_resume(error):
            raise error
        if self._outage_began is None:
            self._outage_began = now
        delay = self._delay(error)
        if now + delay > self._outage_began + self._policy.timeout_seconds:
            raise error
        if self._deadline is not None and now + delay >= self._deadline:
            raise DeadlineExceededError("the deadline passed while the stream was broken")
        self.num_resumes += 1
        return delay

    def _can_resume(self, error: AptServeError) -> bool:
        """Only UNAVAILABLE breaks a stream that may be resumed. While it is being resumed, the old
        request may still hold its id, and the queue may be full of others who come back.
        """
        if not (self._policy.enabled and self._started):
            return False
        if isinstance(error, UnavailableError):
            return True
        transient = isinstance(error, AlreadyExistsError | ResourceExhaustedError)
        return transient and self._outage_began is not None

    def _delay(self, error: AptServeError) -> float:
        delay = min(_MOST_DELAY_SECONDS, _FIRST_DELAY_SECONDS * 2.0 ** min(self._num_delays, 16))
        self._num_delays += 1
        delay *= random.uniform(0.5, 1.0)
        if isinstance(error, ResourceExhaustedError) and error.retry_after_seconds is not None:
            delay = max(delay, error.retry_after_seconds)
        return delay

    def _start(self, started: inference_pb2.Started) -> None:
        self._started = True
        self._model = started.model
        self._request.request_id = started.request_id

    def _take(self, message: inference_pb2.TokenChunk) -> Chunk:
        chunk = _wire.chunk_from_proto(message)
        self._text.append(chunk.text)
        self._token_ids.extend(chunk.token_ids)
        self._logprobs.extend(chunk.logprobs)
        self._outage_began = None
        self._num_delays = 0
        return chunk

    def _finish(self, finished: inference_pb2.Finished) -> None:
        has_stop_token = finished.HasField("matched_stop_token_id")
        self.result = Completion(
            request_id=self._request.request_id,
            model=self._model,
            text=self.text,
            token_ids=self.token_ids,
            logprobs=tuple(self._logprobs),
            finish_reason=_wire.finish_reason_from_proto(finished.finish_reason),
            matched_stop_string=finished.matched_stop_string or None,
            matched_stop_token_id=finished.matched_stop_token_id if has_stop_token else None,
            usage=_wire.usage_from_proto(finished.usage),
            timing=_wire.timing_from_proto(finished.timing),
        )
