"""Choosing tokens for a batch of rows, in plain torch: the rules that other forms must match.

Logits are first adjusted (penalties, bias), then a token is drawn. Two choices make a draw the same
whatever the machine and the rest of the batch:

- The random number is a function of the request's seed and its output position.
- Probabilities are whole numbers: a token weighs ``2^35 · exp((logit - best) / temperature)``,
  rounded. Sums of whole numbers do not depend on their order.

Filters cut the tokens sorted by falling logit, ties in token order: first ``top_k``, then ``top_p``
of what is left, then ``min_p`` against the best token. The kept tokens are laid side by side in
token order, and the one that the random number points at is chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

WEIGHT_BITS = 35
"""The best token weighs ``2**35``: 2^18 tokens have a sum that float64 holds exactly."""

COUNT_DTYPE = torch.int16
MAX_COUNT = 2**14 - 1
"""Occurrences in an output beyond this one count no more."""

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Penalties:
    """What the tokens seen so far cost.

    ``repetition``, ``presence``, ``frequency``: ``[batch]`` float32. ``counts``: ``[max_sequences,
    vocab_size]`` int16, see :func:`new_counts`; ``rows``: ``[batch]`` int64, each sequence's row of
    it, all different, negative for none.
    """

    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    counts: Tensor
    rows: Tensor


@dataclass(frozen=True, slots=True)
class TokenBias:
    """Numbers added to single logits, -inf to forbid a token; each ``[entries]``.

    ``rows`` (int64) of the batch, negative for no entry; ``token_ids`` int64; ``values`` float32.
    No two entries may name the same row and token.
    """

    rows: Tensor
    token_ids: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How each row's token is chosen; tensors ``[batch]``.

    ``temperature`` float32, 0 for the most likely token; ``top_k`` int64, 0 for all; ``top_p`` and
    ``min_p`` float64, 1 and 0 for all. ``seed`` int64 holds the bits of an unsigned number;
    ``position`` int64 counts the output tokens before this one.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    position: Tensor
    penalties: Penalties | None = None
    bias: TokenBias | None = None


def new_counts(max_sequences: int, vocab_size: int, device: torch.device) -> Tensor:
    """What each sequence has seen: twice its number in the output, plus 1 for the prompt."""
    return torch.zeros(max_sequences, vocab_size, dtype=COUNT_DTYPE, device=device)


def set_counts(counts: Tensor, row: int, prompt: Tensor, output: Tensor) -> None:
    """Let a sequence begin in ``row``, or go on after it was away; token ids are int64."""
    times = torch.zeros(counts.shape[1], dtype=torch.int32, device=counts.device)
    times.index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
    seen = times.clamp_(max=MAX_COUNT).mul_(2)
    seen[prompt] += 1
    counts[row] = seen.to(COUNT_DTYPE)


def count_tokens(counts: Tensor, rows: Tensor, token_ids: Tensor) -> None:
    """Note one new output token for each of ``rows``; a negative row is passed over."""
    at = (rows.clamp_min(0), token_ids)
    counts_on = (rows >= 0) & (counts[at] < 2 * MAX_COUNT)
    # Rows passed over add nothing to the first one.
    counts.index_put_(at, 2 * counts_on.to(counts.dtype), accumulate=True)


def sample(logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """Adjust ``logits`` ``[batch, vocab_size]`` float32 in place, and choose; see :func:`draw`."""
    adjust(logits, batch)
    return draw(logits, batch)


def adjust(logits: Tensor, batch: SamplingBatch) -> None:
    """Penalties, then bias; in place.

    A seen token's logit is divided by the repetition penalty if positive, else multiplied. A token
    that occurs n > 0 times in the output loses ``presence + frequency · n``. A forbidden token
    stays NaN or +inf if it is, so that the row is found to be unsound.
    """
    if batch.penalties is not None:
        p = batch.penalties
        seen = torch.where(p.rows.unsqueeze(1) >= 0, p.counts[p.rows.clamp_min(0)], 0)
        repetition = p.repetition.unsqueeze(1)
        milder = torch.where(logits > 0, logits / repetition, logits * repetition)
        penalised = torch.where(seen > 0, milder, logits)
        times = (seen >> 1).to(logits.dtype)
        loss = p.presence.unsqueeze(1) + p.frequency.unsqueeze(1) * times
        logits.copy_(torch.where(times > 0, penalised - loss, penalised))
    if batch.bias is not None:
        b = batch.bias
        values = torch.where(b.rows >= 0, b.values, 0.0)
        logits.index_put_((b.rows.clamp_min(0), b.token_ids), values, accumulate=True)


def draw(logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """Tokens ``[batch]`` int64, and whether each row is sound ``[batch]`` bool.

    A row is sound if it holds no NaN and its maximum is finite; others get token 0. Of equally
    likely best tokens the first is the greedy one.
    """
    tokens, sound = [], []
    for i, row in enumerate(logits):
        best = row.max()
        sound.append(bool(best.isfinite()))  # NaN wins every maximum
        if not sound[-1]:
            tokens.append(0)
        elif float(batch.temperature[i]) == 0.0:
            tokens.append(int((row == best).nonzero()[0]))
        else:
            seed, position = int(batch.seed[i]), int(batch.position[i])
            kept = kept_weights(
                row,
                float(batch.temperature[i]),
                int(batch.top_k[i]),
                float(batch.top_p[i]),
                float(batch.min_p[i]),
            )
            tokens.append(_invert(kept, random_bits(seed, position)))
    return (
        torch.tensor(tokens, dtype=torch.int64, device=logits.device),
        torch.tensor(sound, dtype=torch.bool, device=logits.device),
    )


def kept_weights(row: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Weights ``[vocab_size]`` int64 of the tokens that the filters leave, 0 for the others."""
    one = 2**WEIGHT_BITS
    if top_k <= 0 and top_p >= 1.0:  # nothing to sort for
        scaled = (row.double() - row.max().double()) / temperature
        weights = (scaled.exp() * one).round().long()
        kept: Tensor = weights * (weights >= math.ceil(min(min_p, 1.0) * one))
        return kept
    values, order = row.sort(descending=True, stable=True)
    scaled = (values.double() - values[0].double()) / temperature
    weights = (scaled.exp() * one).round().long()
    if top_k > 0:
        weights[top_k:] = 0
    before = weights.cumsum(0) - weights
    stays = weights >= math.ceil(min(min_p, 1.0) * one)
    if top_p < 1.0:
        # The first token always stays.
        stays &= before < max(1, math.ceil(top_p * int(weights.sum())))
    return torch.zeros_like(weights).index_copy_(0, order, weights * stays)


def random_bits(seed: int, position: int) -> int:
    """53 random bits for output ``position`` of a request with ``seed``.

    The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) over seed and position: no state
    to keep, so a request that was preempted or moved draws the same numbers again.
    """
    return _mix(_mix(seed & _MASK) + (position + 1) * _GOLDEN) >> 11


def _mix(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _invert(weights: Tensor, bits: int) -> int:
    """The token at ``bits / 2^53`` of the way through all weights."""
    cumulative = weights.cumsum(0)
    target = bits * int(cumulative[-1]) >> 53
    return int(torch.searchsorted(cumulative, target, right=True))


def logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of adjusted ``logits`` ``[batch, vocab_size]``.

    Returns those of ``token_ids`` ``[batch]``, then tokens and log-probabilities of the ``num_top``
    best of each row, ``[batch, num_top]``. Nothing waits for the device.
    """
    values = logits.log_softmax(-1)
    chosen = values.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    best = values.topk(min(num_top, values.shape[1]))
    return chosen, best.indices, best.values
