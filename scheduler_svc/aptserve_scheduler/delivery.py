"""From what the core reports to what the clients read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import structlog
from aptserve.errors import AptServeError, InternalError

from aptserve_scheduler.core import FinishReason, RequestFinished, TokensAppended
from aptserve_scheduler.metrics import Metrics
from aptserve_scheduler.stream import RequestStream, SlowReaderError, StreamEnd
from aptserve_scheduler.text.pipeline import OutputItem, OutputReady, TextPipeline

_log = structlog.stdlib.get_logger(__name__)
INTERNAL_TEXT = "internal error"
"""All that a client is told of a fault of ours; the log has the rest under the request id."""


class RequestControl(Protocol):
    """What delivery may have to do to a request."""

    def stop(self, stream: RequestStream) -> None:
        """Its text is over: end it if it still runs."""

    def fail(
        self, stream: RequestStream, error: AptServeError, *, drop_unsent: bool = False
    ) -> None:
        """End it with an error if it still runs; its stream in any case."""


class Delivery:
    """Sends tokens through the text pipeline and on to the streams, in the order of the steps."""

    def __init__(self, control: RequestControl, metrics: Metrics) -> None:
        self._control = control
        self._metrics = metrics
        self._text = TextPipeline(self._deliver)

    def submit(self, items: Sequence[OutputItem]) -> None:
        """Take one step's tokens and ends, one item per request; returns at once."""
        self._text.submit(items)

    def close(self) -> None:
        """Stop the text thread."""
        self._text.close()

    def _deliver(self, ready: Sequence[OutputReady]) -> None:
        for output in ready:
            stream, end = output.item.stream, output.item.end
            if output.error is not None:
                _log.error("text failed", request_id=stream.request_id, exc_info=output.error)
                self._control.fail(stream, InternalError(INTERNAL_TEXT))
                end = end and replace(end, reason=None, error="text failed")
            else:
                self._add(stream, output)
            if end is not None:
                self._finish(output.item, end)

    def _add(self, stream: RequestStream, output: OutputReady) -> None:
        try:
            stream.add(output.item.token_ids, output.text, output.item.logprobs)
        except SlowReaderError as error:
            self._control.fail(stream, error, drop_unsent=True)
        if output.matched_stop_string is not None:
            stream.matched_stop_string = output.matched_stop_string
            self._control.stop(stream)

    def _finish(self, item: OutputItem, end: RequestFinished) -> None:
        """The last thing that happens to a request."""
        stream = item.stream
        log = _log.bind(request_id=stream.request_id)
        if end.reason is None:
            self._metrics.failures.inc()
            log.warning("request failed", error=end.error)
            stream.fail(InternalError(INTERNAL_TEXT))
            return
        matched = stream.matched_stop_string
        reason = end.reason if matched is None else FinishReason.STOP
        is_stop_token = reason is FinishReason.STOP and matched is None and len(item.token_ids) > 0
        self._metrics.observe_end(reason, end.timing)
        log.info(
            "request finished", reason=reason.value, num_output_tokens=stream.num_output_tokens
        )
        stream.finish(
            StreamEnd(
                reason=reason,
                timing=end.timing,
                matched_stop_string=matched,
                matched_stop_token_id=item.token_ids[-1] if is_stop_token else None,
            )
        )


def with_tokens(item: OutputItem, event: TokensAppended) -> OutputItem:
    """The item with the event's tokens behind its own."""
    logprobs = event.logprobs if isinstance(event.logprobs, tuple) else ()
    return replace(
        item,
        token_ids=(*item.token_ids, *event.token_ids),
        logprobs=(*item.logprobs, *logprobs),
    )
