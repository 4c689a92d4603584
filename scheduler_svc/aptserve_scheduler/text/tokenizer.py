"""The model's tokenizer, as the worker sent it."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer


class TokenizerError(Exception):
    """The tokenizer's JSON cannot be loaded."""


class TextCodec:
    """Text to tokens and back for one model. Safe to use from several threads."""

    def __init__(self, tokenizer_json: bytes) -> None:
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer_json.decode())
        except Exception as error:  # the library raises bare Exception for any bad JSON
            raise TokenizerError(str(error)) from error
        # Training settings that some files carry; a prompt is neither cut nor filled up.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, with the special tokens that the model wants around it."""
        # Unlike ``encode``, the batch call lets other threads run: a prompt may take a second.
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=True)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens without the special ones; bytes that are no character give U+FFFD."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text
