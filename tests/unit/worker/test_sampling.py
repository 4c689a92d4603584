from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from aptserve_kernels import Kernels
from aptserve_worker.plan import NewSequence, Sampling, Tier
from aptserve_worker.sampling import Sampled, Sampler
from aptserve_worker.sequences import Sequence
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCAB = 50
EOS = (2,)


def make_sequence(*, output: int = 0, tokens: list[int] | None = None, **sampling: Any) -> Sequence:
    tokens = tokens or [5, 6, 7, *range(10, 10 + output)]
    values: dict[str, Any] = {"max_tokens": 99, "seed": 1, **sampling}
    new = NewSequence(1, "r", tokens, len(tokens) - output, Tier.KV, Sampling(**values))
    return Sequence.of(new, row=0, context_length=1000)


def make_sampler(eos: Any = EOS) -> Sampler:
    return Sampler(Kernels(), 8, eos, torch.device("cpu"))


def sample(logits: torch.Tensor, sequences: list[Sequence], eos: Any) -> list[Sampled | None]:
    return make_sampler(eos).sample(logits, sequences).read()


def draw(logits: torch.Tensor, **sampling: Any) -> int:
    sampled = sample(logits.unsqueeze(0), [make_sequence(**sampling)], EOS)[0]
    assert sampled is not None
    return sampled.token_id


def frequencies(logits: torch.Tensor, count: int = 4000, **sampling: Any) -> torch.Tensor:
    """How often each token comes up over many seeds."""
    sequences = [make_sequence(seed=seed, **sampling) for seed in range(count)]
    chosen = sample(logits.expand(count, -1), sequences, EOS)
    tokens = torch.tensor([c.token_id for c in chosen if c is not None])
    return torch.bincount(tokens, minlength=logits.shape[0]) / count


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2


def test_greedy_takes_the_largest(logits: torch.Tensor):
    assert draw(logits) == int(logits.argmax())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"temperature": 1.0, "top_k": 5}, [TopKLogitsWarper(5)]),
        ({"temperature": 1.0, "top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"temperature": 1.0, "min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        (
            {"temperature": 1.5, "top_k": 8, "top_p": 0.8, "min_p": 0.05},
            [
                TemperatureLogitsWarper(1.5),
                TopKLogitsWarper(8),
                TopPLogitsWarper(0.8),
                MinPLogitsWarper(0.05),
            ],
        ),
    ],
)
def test_distribution_is_that_of_transformers(
    logits: torch.Tensor, ours: dict[str, Any], theirs: list[Any]
):
    scores = logits.unsqueeze(0).clone()
    for warper in theirs:
        scores = warper(torch.tensor([[1]]), scores)
    wanted = scores.softmax(-1)[0]
    got = frequencies(logits, **ours)
    assert (got[wanted == 0] == 0).all()  # the same tokens are left
    assert float((got - wanted).abs().sum()) < 0.12  # total variation of 4,000 draws


def test_repetition_penalty_is_that_of_transformers(logits: torch.Tensor):
    sequence = make_sequence(output=3, repetition_penalty=1.7, num_logprobs=5)
    sampled = sample(logits.unsqueeze(0), [sequence], EOS)[0]
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    wanted = processor(torch.tensor([sequence.token_ids]), logits.unsqueeze(0).clone())[0]
    assert sampled is not None
    assert sampled.logprobs is not None
    expected = wanted.log_softmax(-1)
    assert sampled.token_id == int(wanted.argmax())
    assert sampled.logprobs.chosen[1] == pytest.approx(float(expected.max()), abs=1e-5)
    assert [t for t, _ in sampled.logprobs.top] == expected.topk(5).indices.tolist()


def test_presence_and_frequency_count_output_only():
    row = torch.zeros(VOCAB)
    row[[5, 10, 11]] = torch.tensor([1.0, 1.2, 1.1])
    tokens = [5, 5, 5, 10, 10, 11]  # prompt: 5 5 5
    penalised = {"tokens": tokens, "output": 3}
    assert draw(row, **penalised) == 10
    assert draw(row, **penalised, presence_penalty=0.15) == 10
    assert draw(row, **penalised, frequency_penalty=0.15) == 5
    assert draw(row, **penalised, frequency_penalty=-0.5) == 10


def test_bias_forbids_and_forces(logits: torch.Tensor):
    best = int(logits.argmax())
    assert draw(logits, logit_bias={best: -math.inf}) == int(logits.topk(2).indices[1])
    assert draw(logits, logit_bias={33: 100.0}) == 33


def test_min_tokens_forbids_every_end():
    row = torch.zeros(VOCAB)
    row[2], row[9], row[4] = 9.0, 8.0, 7.0
    ends = {"stop_token_ids": frozenset({9})}
    assert draw(row, **ends) == 2
    assert draw(row, **ends, min_tokens=1) == 4
    assert draw(row, **ends, min_tokens=1, ignore_eos=True) == 2
    assert draw(row, **ends, min_tokens=1, output=1) == 2


def test_rows_do_not_depend_on_the_batch(logits: torch.Tensor):
    others = [make_sequence(temperature=1.0, seed=s, top_p=0.9) for s in range(6)]
    mine = make_sequence(temperature=1.0, seed=77, output=4)
    alone = sample(logits.unsqueeze(0), [mine], EOS)
    together = sample(logits.expand(7, -1), [*others[:3], mine, *others[3:]], EOS)
    assert together[3] == alone[0]


def test_logprobs_are_of_the_model_before_temperature(logits: torch.Tensor):
    sequence = make_sequence(temperature=0.3, top_k=3, num_logprobs=0)
    sampled = sample(logits.unsqueeze(0), [sequence], EOS)[0]
    assert sampled is not None
    assert sampled.logprobs is not None
    assert sampled.logprobs.top == ()
    expected = float(logits.log_softmax(-1)[sampled.token_id])
    assert sampled.logprobs.chosen == (sampled.token_id, pytest.approx(expected, abs=1e-5))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"num_logprobs": 2}])
def test_a_row_without_finite_logits_fails_alone(logits: torch.Tensor, sampling: dict[str, Any]):
    rows = torch.stack([logits, logits.clone(), logits])
    rows[1, 7] = float("nan")
    got = sample(rows, [make_sequence(**sampling) for _ in range(3)], EOS)
    assert got[1] is None
    assert got[0] is not None
    assert got[0] == got[2]


def test_a_row_with_every_token_forbidden_fails():
    row = torch.full((3,), 1.0)
    bias = dict.fromkeys(range(3), -math.inf)
    assert sample(row.unsqueeze(0), [make_sequence(logit_bias=bias)], EOS) == [None]


def test_penalties_follow_a_sequence_and_not_its_row(logits: torch.Tensor):
    """A row of the counts passes on to another sequence; the first comes back elsewhere."""
    wishes = {"frequency_penalty": 3.0, "repetition_penalty": 1.5}
    sampler, tokens = make_sampler(), [5, 6, 7]
    first = make_sequence(tokens=list(tokens), **wishes)
    for _ in range(4):
        chosen = sampler.sample(logits.unsqueeze(0), [first]).read()[0]
        assert chosen is not None
        first.token_ids.append(chosen.token_id)
    sampler.forget(first.row)
    other = make_sequence(tokens=list(tokens), **wishes)
    fresh = sample(logits.unsqueeze(0), [other], EOS)
    assert sampler.sample(logits.unsqueeze(0), [other]).read() == fresh
    back = make_sequence(tokens=list(first.token_ids), output=4, **wishes)
    back.row = 1
    wanted = sample(logits.unsqueeze(0), [back], EOS)
    assert sampler.sample(logits.unsqueeze(0), [back]).read() == wanted
    first.row = 2  # counted on as it went, against counted at once
    assert wanted == sample(logits.unsqueeze(0), [first], EOS)
