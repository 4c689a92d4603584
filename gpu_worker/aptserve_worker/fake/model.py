"""What the fake engine serves: a model whose next token is a hash of the tokens before it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from aptserve_worker.config import WorkerSettings
from aptserve_worker.plan import (
    CalibrationInfo,
    EngineInfo,
    FinishReason,
    Logprobs,
    Sampling,
    Tier,
    TierInfo,
)

EOS_TOKEN_ID = 256
"""The one token of the byte tokenizer that is no byte."""

VOCAB_SIZE = 257

_PRIME = 2**61 - 1
_FACTOR = 1_000_003


def byte_tokenizer_json() -> bytes:
    """A tokenizer in tokenizers' JSON: token i is byte i, 256 is ``<eos>``; nothing merges."""
    vocab = {character: byte for byte, character in enumerate(_byte_level_alphabet())}
    vocab["<eos>"] = EOS_TOKEN_ID
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    eos = {
        "id": EOS_TOKEN_ID,
        "content": "<eos>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [eos],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    return json.dumps(tokenizer).encode()


def _byte_level_alphabet() -> list[str]:
    """The character that byte-level tokenizers print for each byte: itself where printable Latin-1,
    else the next free one from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters = []
    num_moved = 0
    for byte in range(256):
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(0x100 + num_moved))
            num_moved += 1
    return characters


_TIERS = (
    TierInfo(Tier.KV, 2, 0.0),
    TierInfo(Tier.HIDDEN, 1, 1e-7),
    TierInfo(Tier.KV8, 1, 5e-8, exact=False),
)


def _default_tiers() -> tuple[TierInfo, ...]:
    """Exact ones, as a real worker offers by itself."""
    return tuple(tier for tier in _TIERS if tier.exact)


@dataclass(frozen=True)
class FakeModel:
    """A fake model and its pool; the defaults serve text of a to z and never end by themselves.

    ``alphabet`` are the token ids that it chooses from. ``eos_after=n`` makes the n-th output token
    the end of sequence; ``None`` never. ``salt`` makes another model of it.
    """

    name: str = "fake"
    context_length: int = 2048
    vocab_size: int = VOCAB_SIZE
    eos_token_ids: Sequence[int] = (EOS_TOKEN_ID,)
    alphabet: Sequence[int] = tuple(b"abcdefghijklmnopqrstuvwxyz ")
    eos_after: int | None = None
    salt: int = 0
    tokenizer_json: bytes = field(default_factory=byte_tokenizer_json, repr=False)
    num_units: int = 4096
    block_size: int = 16
    unit_bytes: int = 4096
    tiers: Sequence[TierInfo] = field(default_factory=_default_tiers)
    calibration: CalibrationInfo = field(
        default_factory=lambda: CalibrationInfo(1e-4, 1e-6, 1e-6, 1e-9)
    )
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 4096

    def __post_init__(self) -> None:
        if not self.alphabet or not self.eos_token_ids:
            raise ValueError("a fake model needs an alphabet and an end-of-sequence token")
        if max(*self.alphabet, *self.eos_token_ids) >= self.vocab_size:
            raise ValueError(f"alphabet or eos_token_ids exceed vocab_size={self.vocab_size}")

    @classmethod
    def from_settings(cls, settings: WorkerSettings) -> FakeModel:
        """The fake model of a worker whose ``model`` is ``"fake"``."""
        tiers = _default_tiers()
        if settings.tiers is not None:
            tiers = tuple(t for t in _TIERS if t.tier in settings.tiers)
        num_units = settings.pool_units or cls.num_units
        if settings.pool_memory is not None:
            num_units = max(2, settings.pool_memory // cls.unit_bytes)
        return cls(
            name=settings.model_name or cls.name,
            num_units=num_units,
            block_size=settings.block_size,
            tiers=tiers,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
        )

    def info(self) -> EngineInfo:
        """What the engine registers."""
        return EngineInfo(
            model_name=self.name,
            fingerprint=f"fake-{self.vocab_size}-{self.salt}",
            architecture="FakeForCausalLM",
            context_length=self.context_length,
            vocab_size=self.vocab_size,
            eos_token_ids=tuple(self.eos_token_ids),
            tokenizer_json=self.tokenizer_json,
            num_units=self.num_units,
            block_size=self.block_size,
            unit_bytes=self.unit_bytes,
            tiers=tuple(self.tiers),
            calibration=self.calibration,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            device="fake",
        )

    def hash_tokens(self, token_ids: Sequence[int], state: int | None = None) -> int:
        """Fold tokens into a state; ``None`` starts one. Folding in pieces gives the same."""
        if state is None:
            state = self.salt + 1
        for token_id in token_ids:
            state = (state * _FACTOR + token_id + 1) % _PRIME
        return state

    def choose(self, state: int, num_output_tokens: int, sampling: Sampling) -> int:
        """The token after those folded into ``state``, the next one being the n-th of the output.

        Depends on the seed where the temperature is not 0, as it would with a real model.
        """
        ends = self.eos_after is not None and num_output_tokens >= self.eos_after
        if ends and not sampling.ignore_eos and num_output_tokens > sampling.min_tokens:
            return self.eos_token_ids[0]
        if sampling.temperature > 0:
            state = self.hash_tokens((sampling.seed & 0xFFFFFFFF, sampling.seed >> 32), state)
        allowed = self.alphabet
        if num_output_tokens <= sampling.min_tokens and sampling.stop_token_ids:
            allowed = [t for t in allowed if t not in sampling.stop_token_ids] or allowed
        return allowed[(state >> 7) % len(allowed)]

    def logprobs(self, token_id: int, sampling: Sampling) -> tuple[Logprobs, ...]:
        """Made-up logprobs of the right shape: the chosen token first, then its neighbours."""
        if sampling.num_logprobs is None:
            return ()
        top = tuple(
            ((token_id + rank) % self.vocab_size, -math.log(2 + rank))
            for rank in range(sampling.num_logprobs)
        )
        return (Logprobs((token_id, -math.log(2)), top),)

    def finish_reason(
        self, token_id: int, num_tokens: int, num_output_tokens: int, sampling: Sampling
    ) -> FinishReason | None:
        """Why the sequence ends with this token, by the rules of a real worker."""
        is_eos = token_id in self.eos_token_ids and not sampling.ignore_eos
        if num_output_tokens > sampling.min_tokens and (
            is_eos or token_id in sampling.stop_token_ids
        ):
            return FinishReason.STOP
        # The last token needs no position of its own: it is never fed back.
        if num_output_tokens >= sampling.max_tokens or num_tokens > self.context_length:
            return FinishReason.LENGTH
        return None


def expected_tokens(
    model: FakeModel, prompt_token_ids: Sequence[int], sampling: Sampling
) -> tuple[list[int], FinishReason]:
    """The whole output for a prompt and why it ends: what a test compares a stream with."""
    state = model.hash_tokens(prompt_token_ids)
    output: list[int] = []
    reason = None
    while reason is None:
        token_id = model.choose(state, len(output) + 1, sampling)
        output.append(token_id)
        state = model.hash_tokens((token_id,), state)
        reason = model.finish_reason(
            token_id, len(prompt_token_ids) + len(output), len(output), sampling
        )
    return output, reason
