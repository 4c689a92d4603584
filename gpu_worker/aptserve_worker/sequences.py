"""The sequences that a worker knows."""

from __future__ import annotations

from dataclasses import dataclass

from aptserve_worker.plan import NewSequence, Sampling, Tier


@dataclass(slots=True)
class Sequence:
    """One sequence: its tokens, how many of them are cached, and where.

    Tokens ``[0, num_computed)`` are in the cache, ``token_ids[num_computed:]`` are to be computed.
    """

    sequence_id: int
    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: Sampling
    tier: Tier
    row: int
    num_blocks: int = 0
    num_computed: int = 0
    has_ended: bool = False

    @classmethod
    def of(cls, new: NewSequence, row: int) -> Sequence:
        """A sequence that starts now."""
        return cls(
            sequence_id=new.sequence_id,
            request_id=new.request_id,
            token_ids=list(new.token_ids),
            num_prompt_tokens=new.num_prompt_tokens,
            sampling=new.sampling,
            tier=new.tier,
            row=row,
        )

    @property
    def num_output_tokens(self) -> int:
        """Tokens after the prompt."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens after the prompt."""
        return self.token_ids[self.num_prompt_tokens :]
