"""From logits to tokens: what sequences wish for, laid out for the device.

Most rows ask for nothing but the most likely token, which is one maximum over all of them. The
others are sampled together, by the rules of :mod:`aptserve_kernels.sampling`; only the tokens come
back to the host, in one copy.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from aptserve_kernels import Kernels
from aptserve_kernels.sampling import (
    Penalties,
    SamplingBatch,
    TokenBias,
    logprobs,
    new_counts,
    set_counts,
)
from torch import Tensor

from aptserve_worker.plan import Logprobs
from aptserve_worker.sequences import Sequence


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token; ``logprobs`` when asked for."""

    token_id: int
    logprobs: Logprobs | None = None


class Sampler:
    """Chooses tokens; rows do not influence one another.

    Keeps, for sequences with penalties, what they have seen: ``[max_num_seqs, vocab_size]`` on the
    device, made when the first of them comes.
    """

    def __init__(
        self,
        kernels: Kernels,
        max_num_seqs: int,
        eos: Seq[int],
        agree: Callable[[Tensor], Tensor] = lambda tokens: tokens,
    ) -> None:
        """``agree``: where ranks sample the same logits, the choice that holds for all of them."""
        self._kernels = kernels
        self._agree = agree
        self._max_num_seqs = max_num_seqs
        self._eos = tuple(eos)
        self._counts: Tensor | None = None
        self._counted: set[int] = set()
        """Rows of the counts that hold those of the sequence that owns the row."""

    def sample(self, logits: Tensor, sequences: Seq[Sequence]) -> list[Sampled | None]:
        """The next token of each sequence; None where its logits hold no finite maximum.

        ``logits``: ``[len(sequences), vocab_size]`` float32.
        """
        if not sequences:
            return []
        best, tokens = logits.max(dim=-1)
        # NaN wins every maximum, so one look at the maximum tells whether a row is sound.
        sound = best.isfinite()
        special = [i for i, s in enumerate(sequences) if not is_plain_greedy(s, self._eos)]
        wanted: dict[int, Logprobs] = {}
        if special:
            rows = torch.tensor(special, dtype=torch.int64, device=logits.device)
            adjusted = logits.index_select(0, rows)
            some = [sequences[i] for i in special]
            tokens[rows], sound[rows] = self._sample(adjusted, some)
            wanted = _wanted_logprobs(adjusted, tokens[rows], some)
        chosen = self._agree(torch.where(sound, tokens, -1)).tolist()
        place = {i: at for at, i in enumerate(special)}
        return [
            None if token < 0 else Sampled(token, wanted.get(place.get(i, -1)))
            for i, token in enumerate(chosen)
        ]

    def forget(self, row: int) -> None:
        """The sequence of a row is gone; another may own the row next, even under the same id."""
        self._counted.discard(row)

    def _sample(self, logits: Tensor, sequences: Seq[Sequence]) -> tuple[Tensor, Tensor]:
        device = logits.device
        wishes = [s.sampling for s in sequences]

        def column(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device)

        batch = SamplingBatch(
            temperature=column([w.temperature for w in wishes], torch.float32),
            top_k=column([w.top_k for w in wishes], torch.int64),
            top_p=column([w.top_p for w in wishes], torch.float64),
            min_p=column([w.min_p for w in wishes], torch.float64),
            seed=column([_signed(w.seed) for w in wishes], torch.int64),
            position=column([s.num_output_tokens for s in sequences], torch.int64),
            penalties=self._penalties(logits, sequences),
            bias=self._bias(sequences, device),
        )
        tokens, sound = self._kernels.sample(logits, batch)
        if batch.penalties is not None:
            self._kernels.count_tokens(batch.penalties.counts, batch.penalties.rows, tokens)
        return tokens, sound

    def _penalties(self, logits: Tensor, sequences: Seq[Sequence]) -> Penalties | None:
        rows = [s.row if _has_penalties(s) else -1 for s in sequences]
        if max(rows) < 0:
            return None
        if self._counts is None:
            self._counts = new_counts(self._max_num_seqs, logits.shape[1], logits.device)
        for sequence in sequences:
            if _has_penalties(sequence) and sequence.row not in self._counted:
                self._begin_counting(self._counts, sequence)
        wishes = [s.sampling for s in sequences]

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32).to(logits.device)

        return Penalties(
            repetition=column([w.repetition_penalty for w in wishes]),
            presence=column([w.presence_penalty for w in wishes]),
            frequency=column([w.frequency_penalty for w in wishes]),
            counts=self._counts,
            rows=torch.tensor(rows, dtype=torch.int64).to(logits.device),
        )

    def _begin_counting(self, counts: Tensor, sequence: Sequence) -> None:
        def on_device(token_ids: Seq[int]) -> Tensor:
            return torch.tensor(token_ids, dtype=torch.int64).to(counts.device)

        prompt = on_device(sorted(set(sequence.token_ids[: sequence.num_prompt_tokens])))
        set_counts(counts, sequence.row, prompt, on_device(sequence.output_token_ids))
        self._counted.add(sequence.row)

    def _bias(self, sequences: Seq[Sequence], device: torch.device) -> TokenBias | None:
        entries: list[tuple[int, int, float]] = []
        for row, sequence in enumerate(sequences):
            biases = dict(sequence.sampling.logit_bias)
            biases.update(dict.fromkeys(_forbidden(sequence, self._eos), float("-inf")))
            entries += [(row, token, value) for token, value in biases.items()]
        if not entries:
            return None
        rows, token_ids, values = zip(*entries, strict=True)
        return TokenBias(
            rows=torch.tensor(rows, dtype=torch.int64).to(device),
            token_ids=torch.tensor(token_ids, dtype=torch.int64).to(device),
            values=torch.tensor(values, dtype=torch.float32).to(device),
        )


def is_plain_greedy(sequence: Sequence, eos: Seq[int]) -> bool:
    """Whether the most likely token is the answer, with nothing else asked for."""
    s = sequence.sampling
    return (
        s.temperature == 0.0
        and s.num_logprobs is None
        and not s.logit_bias
        and not _has_penalties(sequence)
        and not _forbidden(sequence, eos)
    )


def _has_penalties(sequence: Sequence) -> bool:
    s = sequence.sampling
    return (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) != (1.0, 0.0, 0.0)


def _forbidden(sequence: Sequence, eos: Seq[int]) -> list[int]:
    """Tokens that would end the sequence before ``min_tokens``."""
    s = sequence.sampling
    if sequence.num_output_tokens >= s.min_tokens:
        return []
    return sorted({*s.stop_token_ids, *(() if s.ignore_eos else eos)})


def _signed(seed: int) -> int:
    """The same 64 bits as a signed number."""
    seed %= 2**64
    return seed - 2**64 if seed >= 2**63 else seed


def _wanted_logprobs(
    adjusted: Tensor, tokens: Tensor, sequences: Seq[Sequence]
) -> dict[int, Logprobs]:
    """Of the rows that ask for them."""
    numbers = {i: n for i, s in enumerate(sequences) if (n := s.sampling.num_logprobs) is not None}
    if not numbers:
        return {}
    rows = torch.tensor(list(numbers), dtype=torch.int64, device=adjusted.device)
    found = logprobs(adjusted[rows], tokens[rows], max(numbers.values()))
    chosen, best_tokens, best = (part.tolist() for part in found)
    token_ids = tokens[rows].tolist()
    return {
        row: Logprobs(
            (token_ids[at], chosen[at]),
            tuple(zip(best_tokens[at][:num], best[at][:num], strict=True)),
        )
        for at, (row, num) in enumerate(numbers.items())
    }
