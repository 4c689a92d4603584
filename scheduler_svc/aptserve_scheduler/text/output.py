"""Text of one request's output: detokenising, then stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aptserve_scheduler.text.detokenizer import Decode, IncrementalDetokenizer
from aptserve_scheduler.text.stops import StopMatcher


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What some tokens added. ``num_tokens`` of them count: fewer than given after a match."""

    text: str
    num_tokens: int
    matched_stop_string: str | None = None


class OutputText:
    """Text state of one request; used by one thread at a time.

    The text after n tokens depends on those tokens alone, so a stream that is resumed goes on
    where the broken one was: push the resumed tokens and drop their text.
    """

    def __init__(
        self, decode: Decode, prompt_token_ids: Sequence[int], stop_strings: Sequence[str]
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(decode, prompt_token_ids)
        self._stops = StopMatcher(stop_strings)
        self._matched = False

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Take tokens. After a match nothing counts any more."""
        parts: list[str] = []
        for index, token_id in enumerate(token_ids):
            if self._matched:
                return TextDelta("".join(parts), index)
            scan = self._stops.push(self._detokenizer.push(token_id))
            parts.append(scan.text)
            if scan.matched is not None:
                self._matched = True
                return TextDelta("".join(parts), index + 1, scan.matched)
        return TextDelta("".join(parts), len(token_ids))

    def flush(self) -> TextDelta:
        """The rest: no more tokens will come. It may complete a stop string."""
        if self._matched:
            return TextDelta("", 0)
        scan = self._stops.push(self._detokenizer.flush())
        if scan.matched is not None:
            self._matched = True
            return TextDelta(scan.text, 0, scan.matched)
        return TextDelta(scan.text + self._stops.flush(), 0)
