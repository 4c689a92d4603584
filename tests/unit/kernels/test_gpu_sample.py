"""Sampling: the kernels against the torch form."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from aptserve_kernels import sampling
from aptserve_kernels.gpu import adjust as gpu_adjust
from aptserve_kernels.gpu.sample import draw, sample
from aptserve_kernels.sampling import Penalties, SamplingBatch, TokenBias
from torch import Tensor

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")
FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 10**6},
    {"top_p": 0.4},
    {"top_p": 0.95},
    {"min_p": 0.2},
    {"top_k": 20, "top_p": 0.7},
    {"top_k": 50, "min_p": 0.05},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.1},
]


def make_batch(rows: int, **chosen: float | list) -> SamplingBatch:
    """Every row alike, but for what is given as a list; seeds 0, 1, 2, ... unless chosen."""
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "position": 0}
    values = {**values, "seed": list(range(rows)), **chosen}
    dtypes = {"temperature": torch.float32, "top_p": torch.float64, "min_p": torch.float64}

    def tensor(name: str) -> Tensor:
        value, dtype = values[name], dtypes.get(name, torch.int64)
        return torch.tensor(value if isinstance(value, list) else [value] * rows, dtype=dtype)

    return SamplingBatch(**{name: tensor(name) for name in values})


def _kept(row: Tensor, batch: SamplingBatch, i: int) -> Tensor:
    wishes = (batch.temperature, batch.top_k, batch.top_p, batch.min_p)
    return sampling.kept_weights(row, *(wish[i].item() for wish in wishes))


def _assert_drawn_as_defined(logits: Tensor, batch: SamplingBatch) -> None:
    """Each token is kept, and the random number is in its part, or within 1e-6 of it."""
    tokens, is_sound = draw(logits, batch)
    assert is_sound.all()
    for i, token in enumerate(tokens.tolist()):
        kept = _kept(logits[i], batch, i)
        assert kept[token] > 0
        ends = kept.cumsum(0).double() / float(kept.sum())
        number = sampling.random_bits(int(batch.seed[i]), int(batch.position[i])) * 2.0**-53
        begin = float(ends[token - 1]) if token else 0.0
        assert begin - 1e-6 <= number <= float(ends[token]) + 1e-6


def test_random_numbers_come_from_the_published_finaliser():
    assert sampling._mix(0) == 0xE220A8397B1DCDAF  # SplitMix64's first number from seed 0
    numbers = [sampling.random_bits(seed, place) for seed in range(50) for place in range(50)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 2**53 for number in numbers)
    assert abs(sum(numbers) / len(numbers) / 2**53 - 0.5) < 0.02


def test_the_kernel_makes_the_same_random_numbers():
    vocab_size = 3 * 4096 - 5  # equal weights: the token tells the number to 13 bits
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 77, 78, 79]
    positions = [0, 1, 2, 10**9, 5, 0, 0, 10**12]
    batch = make_batch(8, seed=seeds, position=positions)
    tokens, _ = draw(torch.zeros(8, vocab_size), batch)
    numbers = [sampling.random_bits(s, p) for s, p in zip(seeds, positions, strict=True)]
    wanted = [number * vocab_size >> 53 for number in numbers]
    assert tokens.tolist() == wanted


@pytest.mark.parametrize("vocab_size", [1, 5, 4096, 4097, 10000])
def test_greedy_rows_get_the_first_best_token_and_unsound_rows_are_told(vocab_size: int):
    torch.manual_seed(0)
    logits = torch.randn(9, vocab_size + 3)[:, :vocab_size]  # rows that lie apart
    last = vocab_size - 1
    logits[1] = 0.25
    logits[2, last] = 9.0
    logits[3] = torch.where(torch.arange(vocab_size) % 2 == 0, -0.0, 0.0)
    logits[4, last] = NAN
    logits[5, 0] = INF
    logits[6] = -INF
    logits[7] = -INF
    logits[7, last] = -3e38
    batch = make_batch(9, temperature=[0.0] * 8 + [1e-6])
    tokens, is_sound = draw(logits, batch)
    wanted, wanted_sound = sampling.draw(logits, batch)
    assert is_sound.tolist() == wanted_sound.tolist() == [i not in (4, 5, 6) for i in range(9)]
    assert torch.equal(tokens, wanted)
    assert tokens[[1, 2, 3, 4, 5, 6, 7]].tolist() == [0, last, 0, 0, 0, 0, last]
    unsound = draw(logits[4:7], make_batch(3, temperature=1.0, top_k=3, top_p=0.5))
    assert unsound[0].tolist() == [0, 0, 0]
    assert not unsound[1].any()


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("vocab_size", [7, 1000])
def test_draws_follow_the_definition(filters: dict[str, float], vocab_size: int):
    torch.manual_seed(vocab_size)
    logits = torch.randn(3, vocab_size) * 3
    batch = make_batch(3, temperature=[0.1, 1.5, 100.0], position=3, **filters)
    _assert_drawn_as_defined(logits, batch)


def test_draws_from_a_real_vocabulary():
    torch.manual_seed(0)
    logits = torch.randn(3, 50272) * 4
    logits[:, ::3] = -INF
    _assert_drawn_as_defined(
        logits, make_batch(3, top_k=[0, 50, 0], top_p=[0.9, 0.95, 1.0], min_p=[0.0, 0.0, 0.01])
    )


@pytest.mark.parametrize("filters", FILTERS)
def test_what_is_kept_among_equal_logits_is_exact(filters: dict[str, float]):
    torch.manual_seed(3)
    rows = 8
    logits = (torch.randn(24) * 2).round() / 2  # few values, so that every cut falls among equals
    batch = make_batch(rows, temperature=2.0, **filters)
    tokens, _ = draw(logits.repeat(rows, 1), batch)
    kept = _kept(logits, batch, 0)
    assert set(tokens.tolist()) <= set(kept.nonzero().flatten().tolist())
    assert tokens.tolist() == sampling.draw(logits.repeat(rows, 1), batch)[0].tolist()


def test_cuts_among_equal_logits_of_several_tiles():
    logits = torch.zeros(8, 9000)
    logits[:4, 4500] = -1.0
    logits[:4, 8000] = 9.0  # likely, and behind the cut in token order
    batch = make_batch(8, top_k=[4600] * 4 + [0] * 4, top_p=[1.0] * 4 + [0.5] * 4)
    for i, count in ((0, 4600), (4, 4500)):
        assert int((_kept(logits[i], batch, i) > 0).sum()) == count
    tokens, _ = draw(logits, batch)
    assert tokens.tolist() == sampling.draw(logits, batch)[0].tolist()
    assert 8000 in tokens.tolist()


@pytest.mark.parametrize(("top_p", "count"), [(0.5, 4), (0.51, 5), (0.375, 3), (1e-9, 1)])
def test_top_p_stops_where_the_sum_is_reached(top_p: float, count: int):
    rows = 20
    tokens, _ = draw(torch.zeros(rows, 8), make_batch(rows, top_p=top_p))
    assert set(tokens.tolist()) == set(range(count))


def test_a_row_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    logits = torch.randn(6, 5000) * 2
    batch = make_batch(6, top_k=[0, 9, 0, 50, 0, 0], top_p=[1.0, 1.0, 0.8, 0.9, 1.0, 0.5])
    together, _ = draw(logits, batch)
    for i in range(6):
        alone = SamplingBatch(
            *(getattr(batch, name)[i : i + 1] for name in SamplingBatch.__slots__[:6])
        )
        assert draw(logits[i : i + 1], alone)[0].item() == together[i].item()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_parameters_out_of_range_end_in_some_token():
    logits = torch.randn(6, 30)
    batch = make_batch(
        6,
        temperature=[NAN, 1e-40, INF, 1.0, 1.0, 1.0],
        top_k=[3, -1, 3, 3, 3, 3],
        top_p=[0.5, 0.5, 0.5, NAN, -1.0, 7.0],
        min_p=[0.0, 0.0, 0.0, NAN, 0.0, 7.0],
    )
    tokens, _ = draw(logits, batch)
    assert ((tokens >= 0) & (tokens < 30)).all()


def test_drawn_tokens_have_the_frequencies_of_their_weights():
    weights = torch.tensor([0, 2**33, 2**34, 0, 2**35, 2**32])
    draws = 20000
    drawn = (sampling._invert(weights, sampling.random_bits(9, i)) for i in range(draws))
    found = Counter(drawn)
    assert set(found) == {1, 2, 4, 5}
    for token, count in found.items():
        share = float(weights[token]) / float(weights.sum())
        assert abs(count / draws - share) < 4 * (share * (1 - share) / draws) ** 0.5


def _history(vocab_size: int, rows: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    counts = sampling.new_counts(rows + 2, vocab_size, CPU)
    histories = []
    for row in range(rows + 2):
        prompt, output = torch.randint(vocab_size, (8,)), torch.randint(vocab_size, (30,))
        output[:5] = prompt[0]
        sampling.set_counts(counts, row, prompt, output[:row])
        histories.append((prompt, output[:row]))
    return counts, histories


def test_penalties_and_bias():
    torch.manual_seed(0)
    vocab_size, rows = 2500, 5
    counts, _ = _history(vocab_size, rows)
    logits = torch.randn(rows, vocab_size + 4)[:, :vocab_size] * 5
    logits[3, 7] = NAN
    penalties = Penalties(
        torch.tensor([1.3, 1.0, 0.5, 1.0, 2.0]),
        torch.tensor([0.0, 1.5, -2.0, 0.0, 2.0]),
        torch.tensor([0.3, 0.0, 0.2, 0.0, 2.0]),
        counts,
        torch.tensor([6, 2, 4, 5, -1]),
    )
    bias = TokenBias(
        torch.tensor([0, 0, 3, -1, 4, 3]),
        torch.tensor([5, vocab_size - 1, 7, 9, 0, 8]),
        torch.tensor([2.5, -INF, -INF, 99.0, -1.0, -INF]),
    )
    batch = replace(make_batch(rows, temperature=0.0), penalties=penalties, bias=bias)
    wanted, before = logits.clone(), logits.clone()
    sampling.adjust(wanted, batch)
    gpu_adjust.adjust(logits, batch)
    torch.testing.assert_close(logits, wanted, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert logits[0, -1] == logits[3, 8] == -INF
    assert logits[3, 7].isnan()  # a forbidden token does not hide that the row is unsound
    assert torch.equal(logits[4, 1:], before[4, 1:])
    assert not torch.equal(logits[2], before[2])


def test_sampling_adjusts_first():
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    bias = TokenBias(torch.tensor([0]), torch.tensor([0]), torch.tensor([-INF]))
    for function in (sample, sampling.sample):
        tokens, is_sound = function(
            logits.clone(), replace(make_batch(2, temperature=0.0), bias=bias)
        )
        assert tokens.tolist() == [1, 0]
        assert is_sound.all()


def test_counts_of_tokens():
    torch.manual_seed(0)
    counts = sampling.new_counts(4, 50, CPU)
    sampling.set_counts(counts, 1, torch.tensor([3, 3, 7]), torch.tensor([7, 7, 9]))
    assert {t: int(counts[1, t]) for t in (3, 7, 9, 10)} == {3: 1, 7: 5, 9: 2, 10: 0}
    assert not counts[[0, 2, 3]].any()
    many = torch.full((20000,), 4)
    sampling.set_counts(counts, 2, torch.tensor([4]), many)
    sampling.set_counts(counts, 3, torch.tensor([], dtype=torch.int64), many[:16382])
    assert counts[2, 4] == 2 * sampling.MAX_COUNT + 1
    other = counts.clone()
    rows, tokens = torch.tensor([2, -1, 3, 1]), torch.tensor([4, 5, 4, 3])
    for _ in range(3):
        gpu_adjust.count_tokens(counts, rows, tokens)
        sampling.count_tokens(other, rows, tokens)
    assert torch.equal(counts, other)
    assert [int(counts[r, t]) for r, t in ((2, 4), (3, 4), (1, 3))] == [
        2 * sampling.MAX_COUNT + 1,
        2 * sampling.MAX_COUNT,
        7,
    ]
    sampling.set_counts(counts, 2, torch.tensor([1]), torch.tensor([2]))
    assert counts[2].nonzero().flatten().tolist() == [1, 2]


def test_logprobs():
    torch.manual_seed(0)
    logits = torch.randn(2, 9)
    chosen, tokens, values = sampling.logprobs(logits, torch.tensor([4, 8]), 3)
    wanted = logits.log_softmax(-1)
    torch.testing.assert_close(chosen, wanted[[0, 1], [4, 8]])
    torch.testing.assert_close(values, wanted.sort(descending=True).values[:, :3])
    torch.testing.assert_close(wanted.gather(1, tokens), values)
    assert sampling.logprobs(logits, torch.tensor([0, 0]), 50)[1].shape == (2, 9)


def test_no_rows():
    tokens, is_sound = sample(torch.zeros(0, 10), make_batch(0))
    assert (tokens.shape, is_sound.shape) == ((0,), (0,))


def test_what_breaks_the_contract_is_named():
    logits, batch = torch.zeros(2, 8), make_batch(2)
    ones, rows = torch.ones(2), torch.arange(2)
    counts = sampling.new_counts(3, 8, CPU)
    penalties = Penalties(ones, ones, ones, counts, rows)
    bias = TokenBias(rows, rows, ones)
    cases = [
        ("logits", logits.double(), batch),
        ("logits", torch.zeros(8, 2).t(), batch),
        ("logits", torch.zeros(2, 2**18 + 1), batch),
        ("temperature", logits, replace(batch, temperature=ones.double())),
        ("top_k", logits, replace(batch, top_k=rows.int())),
        ("min_p", logits, replace(batch, min_p=torch.zeros(1, dtype=torch.float64))),
        ("counts", logits, replace(batch, penalties=replace(penalties, counts=counts[:, :4]))),
        ("counts", torch.zeros(2, 9), replace(batch, penalties=penalties)),
        ("rows", logits, replace(batch, penalties=replace(penalties, rows=rows[:1]))),
        ("values", logits, replace(batch, bias=replace(bias, values=ones[:1]))),
    ]
    for name, wrong_logits, wrong_batch in cases:
        with pytest.raises(ValueError, match=f"^{name}: "):
            sample(wrong_logits, wrong_batch)
