"""Text of a growing token sequence, in whole characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_NUM_CONTEXT_TOKENS = 8
_MAX_PENDING_TOKENS = 64
_BROKEN = "\ufffd"

Decode = Callable[[Sequence[int]], str]
"""Text of token ids, special tokens left out."""


class IncrementalDetokenizer:
    """Decodes one token at a time as the whole would be decoded.

    The text of a token may depend on the one before (the space of a word at the start of a text)
    and a character may be spread over tokens, so a token is decoded behind a few earlier ones,
    and text that ends in a broken character waits for the next token. ``context`` is what came
    before: the prompt.

    ``context ‖ pending``: the text of ``context`` has gone out, that of ``pending`` has not.
    """

    def __init__(self, decode: Decode, context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._context = list(context[-_NUM_CONTEXT_TOKENS:])
        self._context_text = decode(self._context) if self._context else ""
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Take a token; the text that is whole now, often that of this token, sometimes none."""
        self._pending.append(token_id)
        text = self._pending_text()
        is_open = not text or text.endswith(_BROKEN)
        # A run of bytes that never becomes a character must not be decoded over and over.
        if is_open and len(self._pending) < _MAX_PENDING_TOKENS:
            return ""
        self._advance()
        return text

    def flush(self) -> str:
        """Text of the waiting tokens, broken characters as U+FFFD: no more tokens will come."""
        if not self._pending:
            return ""
        text = self._pending_text()
        self._advance()
        return text

    def _pending_text(self) -> str:
        text = self._decode(self._context + self._pending)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        # The new token changed how the ones before it read (a run of byte tokens that broke).
        return self._decode(self._pending)

    def _advance(self) -> None:
        self._context = self._pending
        self._context_text = self._decode(self._context)
        self._pending = []
