"""The model that the attached workers serve."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from aptserve.errors import FailedPreconditionError, InvalidArgumentError
from aptserve.v1 import worker_pb2

from aptserve_scheduler.text.encoder import PromptThread
from aptserve_scheduler.text.tokenizer import TextCodec, TokenizerError


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What requests have to know of the model; field by field ``aptserve.v1.ModelInfo``."""

    name: str
    fingerprint: str
    architecture: str
    context_length: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    codec: TextCodec | None


class ModelSlot:
    """Holds the one served model. The first worker brings it, all others must have the same."""

    def __init__(self, threads: PromptThread, is_in_use: Callable[[], bool]) -> None:
        """``is_in_use`` says whether workers or requests still rely on the current model."""
        self._thread = threads
        self._is_in_use = is_in_use
        self._loading = asyncio.Lock()
        self.current: ServedModel | None = None

    async def adopt(self, info: worker_pb2.ModelInfo) -> None:
        """Make sure that ``info`` is the served model.

        Raises :class:`InvalidArgumentError` for an impossible model and
        :class:`FailedPreconditionError` while another one is in use.
        """
        _check(info)
        async with self._loading:  # two workers that come together load one tokenizer
            if self._is_served(info):
                return
            codec = await self._load_codec(info.tokenizer_json)
            self.current = ServedModel(
                name=info.name,
                fingerprint=info.fingerprint,
                architecture=info.architecture,
                context_length=info.context_length,
                vocab_size=info.vocab_size,
                eos_token_ids=frozenset(info.eos_token_ids),
                codec=codec,
            )

    def _is_served(self, info: worker_pb2.ModelInfo) -> bool:
        current = self.current
        if current is None:
            return False
        if (current.fingerprint, current.name) == (info.fingerprint, info.name):
            return True
        if self._is_in_use():
            raise FailedPreconditionError(
                f"model {current.name!r} ({current.fingerprint}) is served here, "
                f"not {info.name!r} ({info.fingerprint})"
            )
        return False

    async def _load_codec(self, tokenizer_json: bytes) -> TextCodec | None:
        if not tokenizer_json:
            return None
        try:
            return await self._thread.run(lambda: TextCodec(tokenizer_json))
        except TokenizerError as error:
            raise InvalidArgumentError("register.model.tokenizer_json", str(error)) from error


def _check(info: worker_pb2.ModelInfo) -> None:
    for name in ("name", "fingerprint"):
        if not getattr(info, name):
            raise InvalidArgumentError(f"register.model.{name}", "must not be empty")
    for name in ("context_length", "vocab_size"):
        if getattr(info, name) < 1:
            raise InvalidArgumentError(f"register.model.{name}", "must be at least 1")
    for token_id in info.eos_token_ids:
        if token_id >= info.vocab_size:
            raise InvalidArgumentError(
                "register.model.eos_token_ids", f"token {token_id} is not in [0, {info.vocab_size})"
            )
