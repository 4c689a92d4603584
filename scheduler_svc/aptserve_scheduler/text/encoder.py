"""Prompt work off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from aptserve.errors import ResourceExhaustedError

_T = TypeVar("_T")
_RETRY_AFTER_SECONDS = 1.0


class PromptThread:
    """One thread for what prompts need: loading tokenizers, tokenising, replaying resumed output.

    Apart from the thread of the output text, so that a prompt of megabytes delays no stream.
    ``max_waiting`` jobs may wait; prompts beyond that are refused before they take memory.
    """

    def __init__(self, max_waiting: int) -> None:
        self._thread = ThreadPoolExecutor(1, "tokenise")
        self._max_waiting = max_waiting
        self._num_jobs = 0

    async def run(self, job: Callable[[], _T]) -> _T:
        """The result of ``job``. Raises :class:`ResourceExhaustedError` if too many wait."""
        if self._num_jobs > self._max_waiting:
            raise ResourceExhaustedError(
                f"{self._num_jobs} prompts wait to be tokenised", _RETRY_AFTER_SECONDS
            )
        self._num_jobs += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, job)
        finally:
            self._num_jobs -= 1

    def close(self) -> None:
        """Stop the thread; jobs that wait are dropped."""
        self._thread.shutdown(wait=False, cancel_futures=True)
