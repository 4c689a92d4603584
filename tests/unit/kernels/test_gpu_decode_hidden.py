"""Decode attention over hidden states: the Triton kernels against their torch twin."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from aptserve_kernels import AttentionParams
from aptserve_kernels import reference as ref
from aptserve_kernels.gpu import decode_hidden as decode_hidden_module
from aptserve_kernels.gpu import hidden_splits, hidden_sum
from aptserve_kernels.gpu.decode_hidden import decode_hidden
from support.caches import PagedCache, make_geometry
from torch import Tensor

PLAIN = AttentionParams(0.3)
PARAMS = [
    PLAIN,
    AttentionParams(0.3, window=21),
    AttentionParams(0.3, softcap=2.0),
    AttentionParams(0.3, window=70, softcap=1.5),
]
LENGTHS = [1, 16, 17, 65, 0, 130]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


def _cache(
    lengths: list[int],
    *,
    heads: int = 4,
    head_dim: int = 16,
    hidden: int | None = None,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> PagedCache:
    geometry = make_geometry(heads=heads, head_dim=head_dim, hidden=hidden, block_size=block_size)
    cache = PagedCache.make(geometry, lengths, tier_units=geometry.hidden_units, dtype=dtype)
    x = torch.randn(sum(lengths), geometry.hidden_size, dtype=dtype)
    empty = torch.zeros(sum(lengths), 0, head_dim, dtype=dtype)
    ref.write_cache(cache.pool, empty, empty, x, cache.slots(hidden=True))
    return cache


def _folded(cache: PagedCache, heads: int) -> Tensor:
    """Queries whose scores vary by a few units, so that the softmax is neither flat nor sharp."""
    width = cache.geometry.hidden_size
    queries = torch.randn(len(cache.lengths), heads, width) * (6 / width**0.5)
    return queries.to(cache.pool.dtype)


def _check(cache: PagedCache, heads: int, params: AttentionParams) -> None:
    folded = _folded(cache, heads)
    batch = cache.decode_batch()
    wanted_sums, sums = torch.empty(2, *folded.shape[:2]).unbind()
    wanted = ref.decode_hidden(folded.double(), cache.pool.double(), batch, params, wanted_sums)
    got = decode_hidden(folded, cache.pool, batch, params, sums)
    assert got.dtype == cache.pool.dtype
    tolerance = TOLERANCE[cache.pool.dtype]
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(sums, wanted_sums, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def _seeded_and_empty_tensors_full_of_nan() -> Iterator[None]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("heads", [5, 12])
def test_ragged_batches(params: AttentionParams, heads: int):
    _check(_cache(LENGTHS, heads=heads), heads, params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_dtypes_and_block_sizes(dtype: torch.dtype, block_size: int):
    _check(_cache([70, 3], heads=3, head_dim=24, block_size=block_size, dtype=dtype), 3, PLAIN)


@pytest.mark.parametrize("hidden", [96, 144])
def test_states_in_several_units(hidden: int):
    """A hidden state of 144 elements beside keys of 96 lies in three units."""
    cache = _cache([50, 7], heads=6, hidden=hidden, dtype=torch.float16)
    assert cache.geometry.hidden_units == (1 if hidden == 96 else 3)
    _check(cache, 6, PARAMS[1])


@pytest.mark.parametrize("heads", [40, 65])
def test_many_heads_take_several_programs(heads: int):
    _check(_cache([20, 33], heads=heads, dtype=torch.float16), heads, PLAIN)


def _spy(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> list[Any]:
    """First arguments of calls of a function, which goes on working."""
    calls, function = [], getattr(module, name)

    def spy(first: Any, *rest: Any) -> Any:
        calls.append(first)
        return function(first, *rest)

    monkeypatch.setattr(module, name, spy)
    return calls


@pytest.mark.parametrize("params", PARAMS[::3])
def test_few_sequences_divide_context_and_width(
    params: AttentionParams, monkeypatch: pytest.MonkeyPatch
):
    partial_scores = _spy(monkeypatch, decode_hidden_module, "merge_products")
    partial_sums = _spy(monkeypatch, hidden_sum, "combine")
    _check(_cache([130, 0, 33], heads=9, dtype=torch.float32), 9, params)
    assert partial_scores[0].shape[0] > 1
    assert partial_sums[0].shape[1] > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_many_sequences_divide_neither(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode_hidden_module, "_PROGRAMS_WANTED", 1)
    monkeypatch.setattr(hidden_splits, "_PROGRAMS_WANTED", 1)
    partial_scores = _spy(monkeypatch, decode_hidden_module, "merge_products")
    partial_sums = _spy(monkeypatch, hidden_sum, "combine")
    for params in PARAMS[::3]:
        _check(_cache([130, 0, 128, 1], dtype=dtype), 4, params)
    assert not partial_scores
    assert not partial_sums


def test_size_of_a_real_model():
    """The shape of OPT-125m."""
    _check(_cache([200], heads=12, head_dim=64, dtype=torch.float16), 12, AttentionParams(0.125))


def test_queries_need_not_be_contiguous():
    """Folding leaves heads outermost."""
    cache = _cache([30, 40])
    folded = _folded(cache, 4)
    apart = folded.transpose(0, 1).contiguous().transpose(0, 1)
    batch = cache.decode_batch()
    got = decode_hidden(apart, cache.pool, batch, PLAIN)
    assert torch.equal(got, decode_hidden(folded, cache.pool, batch, PLAIN))


def test_large_scores_do_not_overflow():
    cache = _cache([100], dtype=torch.float32)
    folded = _folded(cache, 4) * 1000
    for params in PARAMS:
        wanted = ref.decode_hidden(
            folded.double(), cache.pool.double(), cache.decode_batch(), params
        )
        got = decode_hidden(folded, cache.pool, cache.decode_batch(), params)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


def test_units_beyond_the_range_of_int32(monkeypatch: pytest.MonkeyPatch):
    """Only the pages that are touched take memory, so the pool is left as it comes."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    small = _cache([40, 20], dtype=torch.float16)
    g, count = small.geometry, len(small.pool)
    pool = torch.empty(
        2**31 // g.unit_elements + count, g.block_size, g.unit_width, dtype=torch.float16
    )
    first = len(pool) - count
    pool[first:] = small.pool
    batch = small.decode_batch()
    folded = _folded(small, 4)
    wanted = decode_hidden(folded, small.pool, batch, PLAIN)
    batch.tables.add_(first)
    assert torch.equal(decode_hidden(folded, pool, batch, PLAIN), wanted)


def test_layouts_that_do_not_fit_are_refused():
    cache = _cache([5])
    batch, folded = cache.decode_batch(), _folded(cache, 4)
    with pytest.raises(ValueError, match="pool: dtype"):
        decode_hidden(folded.double(), cache.pool.double(), batch, PLAIN)
    with pytest.raises(ValueError, match="pool: expected contiguous"):
        decode_hidden(folded, cache.pool[:, ::2], batch, PLAIN)
    with pytest.raises(ValueError, match="beside a pool of"):
        decode_hidden(folded.half(), cache.pool, batch, PLAIN)
    with pytest.raises(ValueError, match=r"expected \[1, heads, 64\]"):
        decode_hidden(folded[..., :32], cache.pool, batch, PLAIN)
    with pytest.raises(ValueError, match="folded: strides"):
        decode_hidden(folded.repeat(1, 1, 2)[..., ::2], cache.pool, batch, PLAIN)
