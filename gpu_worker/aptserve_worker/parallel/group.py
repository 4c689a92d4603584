"""The ranks of one model and what they tell each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from aptserve_kernels.reference import join_parts
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True, slots=True)
class RankGroup:
    """All processes that hold a part of the model; every method is called by all of them alike.

    ``ALONE`` is that of a process that holds all of it.
    """

    rank: int = 0
    size: int = 1

    def gather_heads(self, rows: Tensor) -> Tensor:
        """``[rows, heads, width]`` of all ranks' heads, from ``[rows, heads / size, width]``."""
        if self.size == 1:
            return rows
        return self._gathered(rows).transpose(0, 1).flatten(1, 2)

    def gather_tokens(self, states: Tensor) -> Tensor:
        """``[size * tokens, width]`` in the order of the sequence, from each rank's tokens.

        ``states``: ``[tokens, width]``, as many on every rank; token i of rank r is token
        ``i * size + r`` of the sequence.
        """
        if self.size == 1:
            return states
        return self._gathered(states).transpose(0, 1).flatten(0, 1)

    def gather_weights(self, weight: Tensor) -> Tensor:
        """``[out, …]`` of all ranks, from ``[out / size, …]``."""
        return weight if self.size == 1 else self._gathered(weight).flatten(0, 1)

    def join(self, parts: Tensor, log_sums: Tensor) -> Tensor:
        """Attention of this rank's heads over all tokens, from that of all heads over each rank's.

        ``parts``: ``[rows, heads, width]``, over this rank's tokens; ``log_sums``: ``[rows,
        heads]``, see :func:`aptserve_kernels.reference.decode_hidden`. Returns ``[rows, heads /
        size, width]``.
        """
        rows, heads, width = parts.shape
        # Sums and their sizes in one message: what it takes is the time of a message, not its bytes
        sent = torch.cat((parts.float(), log_sums.unsqueeze(-1)), dim=-1)
        sent = sent.view(rows, self.size, heads // self.size, width + 1).transpose(0, 1)
        got = torch.empty_like(sent, memory_format=torch.contiguous_format)
        dist.all_to_all_single(got, sent.contiguous())
        return join_parts(got[..., :width], got[..., width]).to(parts.dtype)

    def agree(self, values: Tensor) -> Tensor:
        """The first rank's ``values``, in place: what it chose holds for all."""
        if self.size > 1:
            dist.broadcast(values, 0)
        return values

    def least(self, value: int, device: torch.device) -> int:
        """The smallest ``value`` of any rank."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.int64, device=device)
        dist.all_reduce(shared, dist.ReduceOp.MIN)
        return int(shared)

    def _gathered(self, part: Tensor) -> Tensor:
        """``[size, …]``: what each rank has."""
        out = part.new_empty(self.size, *part.shape)
        dist.all_gather_single(out.view(-1), part.contiguous().view(-1))
        return out


ALONE = RankGroup()
"""The group of a process that holds all of its model."""
