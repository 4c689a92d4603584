"""The sequences that a worker knows."""

from __future__ import annotations

from dataclasses import dataclass, field

from aptserve_worker.plan import NewSequence, Sampling, Tier

UNKNOWN_TOKEN = -1
"""Stands for a token that the device has, or will have, and the host does not know yet."""


@dataclass(slots=True)
class Sequence:
    """One sequence: its tokens, how many of them are cached, and where.

    Steps are launched before the tokens of the step before are known on the host. All counts are
    those after the last launched step:

        token_ids [0, len(token_ids)) | pending [.., num_tokens): chosen on the device, not seen yet

    Tokens ``[0, num_computed)`` are in the cache, the others are to be computed.
    """

    sequence_id: int
    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: Sampling
    tier: Tier
    row: int
    max_num_tokens: int
    """With so many tokens it ends, whatever they are; prompt included."""
    units: list[int] = field(default_factory=list)
    """What it holds of the pool, in the order of its blocks."""
    num_computed: int = 0
    num_pending: int = 0
    has_ended: bool = False
    """Its last token is known."""

    @classmethod
    def of(cls, new: NewSequence, row: int, context_length: int) -> Sequence:
        """A sequence that starts now."""
        return cls(
            sequence_id=new.sequence_id,
            request_id=new.request_id,
            token_ids=list(new.token_ids),
            num_prompt_tokens=new.num_prompt_tokens,
            sampling=new.sampling,
            tier=new.tier,
            row=row,
            # The last token needs no position of its own: it is never fed back.
            max_num_tokens=min(new.num_prompt_tokens + new.sampling.max_tokens, context_length + 1),
        )

    @property
    def num_tokens(self) -> int:
        """All tokens, pending ones included."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_output_tokens(self) -> int:
        """Tokens after the prompt, pending ones included."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def is_over(self) -> bool:
        """Whether it has ended, or ends with a pending token at the latest: nothing more of it
        runs."""
        return self.has_ended or (self.num_pending > 0 and self.num_tokens >= self.max_num_tokens)

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens after the prompt, without pending ones."""
        return self.token_ids[self.num_prompt_tokens :]

    def tokens_to_compute(self, count: int) -> list[int]:
        """The next tokens to compute; of pending ones only the last can be among them."""
        if self.num_pending:
            return [UNKNOWN_TOKEN]
        return self.token_ids[self.num_computed : self.num_computed + count]
