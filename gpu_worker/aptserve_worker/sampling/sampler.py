"""From logits to tokens: what sequences wish for, laid out for the device.

Most rows ask for nothing but the most likely token, which is one maximum over all of them. The
others are sampled together, by the rules of :mod:`aptserve_kernels.sampling`. Nothing here waits
for the device: tokens stay there for the next step, and a copy of them goes to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from aptserve_worker.transfer import Fetch, to_device


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token; ``logprobs`` when asked for."""

    token_id: int
    logprobs: Logprobs | None = None


class Choice:
    """Tokens that the device chooses, on their way to the host."""

    def __init__(self, fetch: Fetch, num_logprobs: Mapping[int, int]) -> None:
        """``fetch``: tokens ``[rows]``, -1 for none; then, of the rows in ``num_logprobs``, what
        :func:`aptserve_kernels.sampling.logprobs` gives."""
        self._fetch = fetch
        self._num_logprobs = num_logprobs

    def wait(self) -> None:
        """Return once they are there; from any thread."""
        self._fetch.wait()

    def read(self) -> list[Sampled | None]:
        """One for each row, None where its logits hold no finite maximum; waits for them."""
        fetched = [tensor.tolist() for tensor in self._fetch.tensors()]
        if not fetched:
            return []
        tokens, *columns = fetched
        found = self._logprobs(tokens, *columns) if self._num_logprobs else {}
        return [
            None if token < 0 else Sampled(token, found.get(row))
            for row, token in enumerate(tokens)
        ]

    def _logprobs(
        self,
        tokens: list[int],
        chosen: list[float],
        best_tokens: list[list[int]],
        best: list[list[float]],
    ) -> dict[int, Logprobs]:
        """By row."""
        return {
            row: Logprobs(
                (tokens[row], chosen[at]),
                tuple(zip(best_tokens[at][:num], best[at][:num], strict=True)),
            )
            for at, (row, num) in enumerate(self._num_logprobs.items())
        }


class Sampler:
    """Chooses tokens; rows do not influence one another.

    Keeps on the device, by the rows of the sequences, the last token of each, and what sequences
    with penalties have seen: ``[max_num_seqs, vocab_size]``, made when the first of them comes.
    """

    def __init__(
        self,
        kernels: Kernels,
        max_num_seqs: int,
        eos: Seq[int],
        device: torch.device,
        agree: Callable[[Tensor], Tensor] = lambda tokens: tokens,
    ) -> None:
        """``agree``: where ranks sample the same logits, the choice that holds for all of them."""
        self._kernels = kernels
        self._agree = agree
        self._max_num_seqs = max_num_seqs
        self._eos = tuple(eos)
        self._device = device
        self.last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        """``[max_num_seqs]``: what each sequence was given last, 0 where nothing could be."""
        self._counts: Tensor | None = None
        self._counted: set[int] = set()
        """Rows of the counts that hold those of the sequence that owns the row."""

    def sample(self, logits: Tensor, sequences: Seq[Sequence]) -> Choice:
        """Choose the next token of each sequence.

        ``logits``: ``[len(sequences), vocab_size]`` float32.
        """
        if not sequences:
            return Choice(Fetch((), self._device), {})
        best, tokens = logits.max(dim=-1)
        # NaN wins every maximum, so one look at the maximum tells whether a row is sound.
        sound = best.isfinite()
        special = [i for i, s in enumerate(sequences) if not is_plain_greedy(s, self._eos)]
        asked: dict[int, int] = {}
        columns: tuple[Tensor, ...] = ()
        if special:
            rows = self._column(special, torch.int64)
            adjusted = logits.index_select(0, rows)
            some = [sequences[i] for i in special]
            tokens[rows], sound[rows] = self._sample(adjusted, some)
            asked = _num_logprobs(some)
            if asked:
                of_asked = self._column(list(asked), torch.int64)
                taken = tokens.index_select(0, rows.index_select(0, of_asked))
                adjusted = adjusted.index_select(0, of_asked)
                columns = logprobs(adjusted, taken, max(asked.values()))
        chosen = self._agree(torch.where(sound, tokens, -1))
        table_rows = self._column([s.row for s in sequences], torch.int64)
        # A sequence without a token has failed, but a step launched already may run it on.
        self.last_tokens.index_copy_(0, table_rows, chosen.clamp_min(0))
        fetch = Fetch((chosen, *columns), self._device)
        return Choice(fetch, {special[i]: num for i, num in asked.items()})

    def forget(self, row: int) -> None:
        """The sequence of a row is gone; another may own the row next, even under the same id."""
        self._counted.discard(row)

    def _sample(self, logits: Tensor, sequences: Seq[Sequence]) -> tuple[Tensor, Tensor]:
        wishes = [s.sampling for s in sequences]
        batch = SamplingBatch(
            temperature=self._column([w.temperature for w in wishes], torch.float32),
            top_k=self._column([w.top_k for w in wishes], torch.int64),
            top_p=self._column([w.top_p for w in wishes], torch.float64),
            min_p=self._column([w.min_p for w in wishes], torch.float64),
            seed=self._column([_signed(w.seed) for w in wishes], torch.int64),
            position=self._column([s.num_output_tokens for s in sequences], torch.int64),
            penalties=self._penalties(logits, sequences),
            bias=self._bias(sequences),
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
            self._counts = new_counts(self._max_num_seqs, logits.shape[1], self._device)
        for sequence in sequences:
            if _has_penalties(sequence) and sequence.row not in self._counted:
                self._begin_counting(self._counts, sequence)
        wishes = [s.sampling for s in sequences]
        return Penalties(
            repetition=self._column([w.repetition_penalty for w in wishes], torch.float32),
            presence=self._column([w.presence_penalty for w in wishes], torch.float32),
            frequency=self._column([w.frequency_penalty for w in wishes], torch.float32),
            counts=self._counts,
            rows=self._column(rows, torch.int64),
        )

    def _begin_counting(self, counts: Tensor, sequence: Sequence) -> None:
        """Count what the host knows: all there is, since the first token comes only now."""
        prompt = sorted(set(sequence.token_ids[: sequence.num_prompt_tokens]))
        set_counts(
            counts,
            sequence.row,
            self._column(prompt, torch.int64),
            self._column(sequence.output_token_ids, torch.int64),
        )
        self._counted.add(sequence.row)

    def _bias(self, sequences: Seq[Sequence]) -> TokenBias | None:
        entries: list[tuple[int, int, float]] = []
        for row, sequence in enumerate(sequences):
            biases = dict(sequence.sampling.logit_bias)
            biases.update(dict.fromkeys(_forbidden(sequence, self._eos), float("-inf")))
            entries += [(row, token, value) for token, value in biases.items()]
        if not entries:
            return None
        rows, token_ids, values = zip(*entries, strict=True)
        return TokenBias(
            rows=self._column(rows, torch.int64),
            token_ids=self._column(token_ids, torch.int64),
            values=self._column(values, torch.float32),
        )

    def _column(self, values: Seq[float] | Seq[int], dtype: torch.dtype) -> Tensor:
        return to_device(torch.tensor(values, dtype=dtype), self._device)


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


def _num_logprobs(sequences: Seq[Sequence]) -> dict[int, int]:
    """How many of the most likely tokens' are asked for, by row; of rows that ask for any."""
    return {i: n for i, s in enumerate(sequences) if (n := s.sampling.num_logprobs) is not None}
