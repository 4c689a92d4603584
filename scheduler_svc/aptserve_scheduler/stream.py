"""One request's answer on its way from the driver to the client."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from aptserve.errors import AptServeError, ResourceExhaustedError
from aptserve.v1 import types_pb2

from aptserve_scheduler.core.types import FinishReason, RequestId, RequestTiming
from aptserve_scheduler.text.output import OutputText

MAX_UNSENT_TOKENS = 4096
"""A reader that is further behind is cut: nobody's tokens may pile up without a bound."""


class SlowReaderError(ResourceExhaustedError):
    """The client does not read its stream."""

    reason = "SLOW_READER"


@dataclass(slots=True)
class Chunk:
    """Tokens and text since the last chunk."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[types_pb2.PositionLogprobs] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """How a request ended well."""

    reason: FinishReason
    timing: RequestTiming
    matched_stop_string: str | None = None
    matched_stop_token_id: int | None = None


class RequestStream:
    """Buffer between the driver, which writes, and one ``Generate`` call, which reads.

    Lives on the event loop; only ``output_text`` is used by the text thread.
    """

    def __init__(
        self,
        request_id: RequestId,
        *,
        num_prompt_tokens: int,
        num_resumed_tokens: int = 0,
        output_text: OutputText | None = None,
        arrival: float,
    ) -> None:
        self.request_id = request_id
        self.num_prompt_tokens = num_prompt_tokens
        self.num_output_tokens = num_resumed_tokens
        self.output_text = output_text
        self.arrival = arrival
        self.last_token_at: float | None = None
        """When the driver last saw a token of this request."""
        self.matched_stop_string: str | None = None
        """Set when the text is over although the core may still count tokens."""
        self._unsent: Chunk | None = None
        self._end: StreamEnd | AptServeError | None = None
        self._wake = asyncio.Event()

    @property
    def is_closed(self) -> bool:
        """Whether the end is known; what comes later is dropped."""
        return self._end is not None

    def add(
        self,
        token_ids: Sequence[int],
        text: str,
        logprobs: Sequence[types_pb2.PositionLogprobs] = (),
    ) -> None:
        """Buffer tokens and text for the reader. Raises :class:`SlowReaderError` if full."""
        if self.is_closed or not (token_ids or text):
            return
        chunk = self._unsent or Chunk()
        chunk.token_ids.extend(token_ids)
        chunk.text += text
        chunk.logprobs.extend(logprobs)
        self.num_output_tokens += len(token_ids)
        if len(chunk.token_ids) > MAX_UNSENT_TOKENS:
            raise SlowReaderError(f"more than {MAX_UNSENT_TOKENS} tokens were not read")
        self._unsent = chunk
        self._wake.set()

    def finish(self, end: StreamEnd) -> None:
        """The request ended well; the buffer is still delivered."""
        self._close(end)

    def fail(self, error: AptServeError, *, drop_unsent: bool = False) -> None:
        """The request failed; the buffer is still delivered unless the reader is at fault."""
        if drop_unsent:
            self._unsent = None
        self._close(error)

    async def next(self) -> Chunk | StreamEnd:
        """What there is now, all unsent tokens in one chunk; waits if there is nothing.

        Raises the error that the request failed with.
        """
        while self._unsent is None and self._end is None:
            self._wake.clear()
            await self._wake.wait()
        if self._unsent is not None:
            chunk, self._unsent = self._unsent, None
            return chunk
        if isinstance(self._end, StreamEnd):
            return self._end
        assert self._end is not None
        raise self._end

    def _close(self, end: StreamEnd | AptServeError) -> None:
        if self._end is None:
            self._end = end
            self._wake.set()
