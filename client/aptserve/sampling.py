"""Sampling parameters: the one place that knows their defaults and ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from aptserve.errors import InvalidArgumentError
from aptserve.v1 import types_pb2

DEFAULT_MAX_TOKENS = 256
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 256
_MAX_UINT64 = 2**64 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen; ranges and meaning as in ``aptserve.v1.SamplingParams``.

    ``max_tokens=None`` means 256 or what context and memory leave; ``seed=None`` a random seed;
    ``logprobs=None`` no logprobs.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    stop_token_ids: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    ignore_eos: bool = False

    def validate(self, *, vocab_size: int | None = None) -> None:
        """Raise :class:`InvalidArgumentError` naming the first field that is out of range."""
        self._validate_numbers()
        self._validate_lists(vocab_size)

    def _validate_numbers(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidArgumentError("sampling.max_tokens", "must be at least 1")
        limit = self.max_tokens if self.max_tokens is not None else DEFAULT_MAX_TOKENS
        if not 0 <= self.min_tokens <= limit:
            raise InvalidArgumentError("sampling.min_tokens", f"must be in [0, {limit}]")
        _check_range("temperature", self.temperature, 0.0, 100.0)
        if not 0 <= self.top_k < 2**31:
            raise InvalidArgumentError("sampling.top_k", "must be in [0, 2147483647]")
        _check_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 10.0, low_open=True)
        _check_range("presence_penalty", self.presence_penalty, -10.0, 10.0)
        _check_range("frequency_penalty", self.frequency_penalty, -10.0, 10.0)
        if self.seed is not None and not 0 <= self.seed <= _MAX_UINT64:
            raise InvalidArgumentError("sampling.seed", "must be in [0, 2^64)")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise InvalidArgumentError("sampling.logprobs", f"must be in [0, {MAX_LOGPROBS}]")

    def _validate_lists(self, vocab_size: int | None) -> None:
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidArgumentError("sampling.logit_bias", f"at most {MAX_LOGIT_BIAS} entries")
        for token_id, bias in self.logit_bias.items():
            _check_token("sampling.logit_bias.token_id", token_id, vocab_size)
            if math.isnan(bias) or bias == math.inf:
                raise InvalidArgumentError("sampling.logit_bias.bias", "must be finite or -inf")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidArgumentError(
                "sampling.stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS} tokens"
            )
        for token_id in self.stop_token_ids:
            _check_token("sampling.stop_token_ids", token_id, vocab_size)
        if len(self.stop_strings) > MAX_STOP_STRINGS:
            raise InvalidArgumentError("sampling.stop_strings", f"at most {MAX_STOP_STRINGS}")
        for stop in self.stop_strings:
            if not 1 <= len(stop.encode(errors="surrogatepass")) <= MAX_STOP_STRING_BYTES:
                raise InvalidArgumentError(
                    "sampling.stop_strings", f"each must have 1 to {MAX_STOP_STRING_BYTES} bytes"
                )

    def to_proto(self) -> types_pb2.SamplingParams:
        """The message; fields at their defaults are left out where unset means the default."""
        message = types_pb2.SamplingParams(
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=[
                types_pb2.LogitBias(token_id=t, bias=b) for t, b in self.logit_bias.items()
            ],
            stop_token_ids=self.stop_token_ids,
            stop_strings=self.stop_strings,
            ignore_eos=self.ignore_eos,
        )
        for name in ("max_tokens", "seed", "logprobs"):
            value = getattr(self, name)
            if value is not None:
                setattr(message, name, value)
        return message

    @classmethod
    def from_proto(cls, message: types_pb2.SamplingParams) -> SamplingParams:
        """The parameters of a message, unset fields at their defaults; not validated."""
        optional = {
            name: getattr(message, name)
            for name in _OPTIONAL_FIELDS
            if message.HasField(name)  # type: ignore[arg-type]
        }
        bias: dict[int, float] = {}
        for entry in message.logit_bias:
            if entry.token_id in bias:
                raise InvalidArgumentError(
                    "sampling.logit_bias.token_id", f"token {entry.token_id} appears twice"
                )
            bias[entry.token_id] = entry.bias
        return cls(
            logit_bias=bias,
            stop_token_ids=tuple(message.stop_token_ids),
            stop_strings=tuple(message.stop_strings),
            ignore_eos=message.ignore_eos,
            **optional,
        )


_OPTIONAL_FIELDS = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "logprobs",
)


def _check_range(
    name: str, value: float, low: float, high: float, *, low_open: bool = False
) -> None:
    """NaN fails every comparison and so is refused here as well."""
    if not (low < value <= high if low_open else low <= value <= high):
        bracket = "(" if low_open else "["
        raise InvalidArgumentError(f"sampling.{name}", f"must be in {bracket}{low:g}, {high:g}]")


def _check_token(field_name: str, token_id: int, vocab_size: int | None) -> None:
    if token_id < 0 or (vocab_size is not None and token_id >= vocab_size):
        limit = "" if vocab_size is None else f", {vocab_size}"
        raise InvalidArgumentError(field_name, f"token {token_id} is not in [0{limit})")
