"""Text work of all requests on one thread, in the order of the step results."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from aptserve.v1 import types_pb2

from aptserve_scheduler.core.types import FinishReason, RequestFinished
from aptserve_scheduler.stream import RequestStream


@dataclass(frozen=True, slots=True)
class OutputItem:
    """New tokens of a request and perhaps its end, as the core reported them in one step."""

    stream: RequestStream
    token_ids: Sequence[int] = ()
    logprobs: Sequence[types_pb2.PositionLogprobs] = ()
    end: RequestFinished | None = None


@dataclass(frozen=True, slots=True)
class OutputReady:
    """An item with its text. ``item`` holds only the tokens that count."""

    item: OutputItem
    text: str = ""
    matched_stop_string: str | None = None
    error: BaseException | None = None


class TextPipeline:
    """Turns tokens into text off the event loop; results come back on it, in order.

    One job at a time: while a job runs, later items gather and become the next job together.
    """

    def __init__(self, deliver: Callable[[Sequence[OutputReady]], None]) -> None:
        self._deliver = deliver
        self._waiting: deque[OutputItem] = deque()
        self._thread = ThreadPoolExecutor(1, "detokenise")
        self._job: asyncio.Future[list[OutputReady]] | None = None

    def submit(self, items: Sequence[OutputItem]) -> None:
        """Queue one step's items. Called on the event loop; returns at once."""
        self._waiting.extend(items)
        if self._job is None and self._waiting:
            self._start_job()

    def close(self) -> None:
        """Stop the thread; items not yet done are dropped."""
        self._waiting.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _start_job(self) -> None:
        items = list(self._waiting)
        self._waiting.clear()
        loop = asyncio.get_running_loop()
        job = loop.run_in_executor(self._thread, _advance_all, items)
        job.add_done_callback(self._finish_job)
        self._job = job

    def _finish_job(self, job: asyncio.Future[list[OutputReady]]) -> None:
        self._job = None
        if job.cancelled():  # closed meanwhile
            return
        if self._waiting:
            self._start_job()
        self._deliver(job.result())


def _advance_all(items: Sequence[OutputItem]) -> list[OutputReady]:
    return [_advance_safely(item) for item in items]


def _advance_safely(item: OutputItem) -> OutputReady:
    """One request's bad text must not take the others' with it."""
    try:
        return _advance(item)
    except BaseException as error:  # a panic inside tokenizers is no Exception
        return OutputReady(item, error=error)


def _advance(item: OutputItem) -> OutputReady:
    output_text, end = item.stream.output_text, item.end
    if output_text is None:
        return OutputReady(item)
    # The token that ended a request is counted and sent, but is not part of the text.
    num_text_tokens = len(item.token_ids)
    if end is not None and end.reason is FinishReason.STOP and num_text_tokens:
        num_text_tokens -= 1
    delta = output_text.push(item.token_ids[:num_text_tokens])
    if delta.num_tokens < num_text_tokens or delta.matched_stop_string is not None:
        kept = replace(
            item,
            token_ids=item.token_ids[: delta.num_tokens],
            logprobs=item.logprobs[: delta.num_tokens],
        )
        return OutputReady(kept, delta.text, delta.matched_stop_string)
    if end is None or end.reason is None:
        return OutputReady(item, delta.text)
    rest = output_text.flush()
    return OutputReady(item, delta.text + rest.text, rest.matched_stop_string)
