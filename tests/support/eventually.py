"""Waiting for a condition with a deadline, in place of sleeps."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

DEFAULT_TIMEOUT_SECONDS = 10.0
_POLL_SECONDS = 0.005


async def eventually(
    condition: Callable[[], bool] | Callable[[], Awaitable[bool]],
    *,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    message: str = "",
) -> None:
    """Return as soon as ``condition`` holds; fail the test when the time is over.

    ``condition`` may be a coroutine function. An ``AssertionError`` it raises counts as "not yet"
    and is what the test fails with in the end.
    """
    last: AssertionError | None = None
    try:
        async with asyncio.timeout(timeout_seconds):
            while True:
                try:
                    result = condition()
                    if isinstance(result, bool):
                        holds = result
                    else:
                        holds = await result
                    last = None
                except AssertionError as error:
                    last, holds = error, False
                if holds:
                    return
                await asyncio.sleep(_POLL_SECONDS)
    except TimeoutError:
        what = message or getattr(condition, "__name__", "the condition")
        raise AssertionError(f"not within {timeout_seconds} s: {what}") from last
