"""Every implementation against the reference, and the reference against plain attention."""

from __future__ import annotations

import pytest
import torch
from aptserve_kernels import (
    AttentionParams,
    Kernels,
    KeyProjection,
    LinearMap,
    Rotary,
    cpu,
    resolve,
)
from aptserve_kernels import reference as ref
from support.caches import PagedCache, make_geometry
from torch import Tensor

CPU = resolve(torch.device("cpu"), torch.float32)
LENGTHS = [[1], [4], [5], [1, 3, 4, 5, 17], [9, 9, 9], [40, 2]]
PARAMS = [
    AttentionParams(0.3),
    AttentionParams(0.3, window=3),
    AttentionParams(0.3, softcap=2.0),
    AttentionParams(0.3, softcap=2.0, window=6),
]


def _kv_cache(lengths: list[int], kv_heads: int, hidden: int | None = None):
    geometry = make_geometry(heads=kv_heads, hidden=hidden)
    cache = PagedCache.make(geometry, lengths, tier_units=geometry.kv_units)
    k = torch.randn(sum(lengths), kv_heads, geometry.head_dim)
    v = torch.randn_like(k)
    ref.write_cache(cache.pool, k, v, None, cache.slots(hidden=False))
    return cache, k, v


def _hidden_cache(lengths: list[int], hidden: int = 32, heads: int = 4):
    geometry = make_geometry(heads=heads, hidden=hidden)
    cache = PagedCache.make(geometry, lengths, tier_units=geometry.hidden_units)
    x = torch.randn(sum(lengths), geometry.hidden_size)
    empty = torch.zeros(sum(lengths), 0, 8)
    ref.write_cache(cache.pool, empty, empty, x, cache.slots(hidden=True))
    return cache, x


def test_gather_returns_what_was_written():
    for hidden in (32, 48):  # one unit per vector, and several
        cache, k, v = _kv_cache([5, 11], 4, hidden)
        start = 0
        for table, length in zip(cache.tables, cache.lengths, strict=True):
            got_k, got_v = ref.gather_kv(cache.pool, table, length, cache.geometry)
            assert torch.equal(got_k, k[start : start + length])
            assert torch.equal(got_v, v[start : start + length])
            start += length
        cache, x = _hidden_cache([5, 11], hidden)
        assert torch.equal(
            ref.gather_hidden(cache.pool, cache.tables[1], 11, cache.geometry), x[5:]
        )


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("params", PARAMS)
def test_decode_kv(lengths: list[int], group: int, params: AttentionParams):
    torch.manual_seed(0)
    cache, k, v = _kv_cache(lengths, 4)
    q = torch.randn(len(lengths), 4 * group, cache.geometry.head_dim)
    expected, start = [], 0
    for i, length in enumerate(lengths):
        end = start + length
        expected.append(ref.attend(q[i : i + 1], k[start:end], v[start:end], params)[0])
        start = end
    wanted = torch.stack(expected)
    torch.testing.assert_close(ref.decode_kv(q, cache.pool, cache.decode_batch(), params), wanted)
    got = CPU.decode_kv(q, cache.pool, cache.decode_batch(), params)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("hidden", [32, 48])
@pytest.mark.parametrize("params", PARAMS)
def test_decode_hidden_equals_attention_over_projected_keys_and_values(
    lengths: list[int], hidden: int, params: AttentionParams
):
    torch.manual_seed(0)
    cache, x = _hidden_cache(lengths, hidden)
    w_k, w_v = torch.randn(4, 8, hidden) / 5, torch.randn(4, 8, hidden) / 5
    b_k, b_v = torch.randn(4, 8), torch.randn(4, 8)
    if params.softcap is not None:
        b_k = torch.zeros(4, 8)  # the bias drops out of a softmax, not out of tanh
    q = torch.randn(len(lengths), 4, 8)
    expected, start = [], 0
    for i, length in enumerate(lengths):
        part = x[start : start + length]
        k = torch.einsum("ld,hed->lhe", part, w_k) + b_k
        v = torch.einsum("ld,hed->lhe", part, w_v) + b_v
        expected.append(ref.attend(q[i : i + 1], k, v, params)[0])
        start += length
    wanted = torch.stack(expected)
    for decode in (ref.decode_hidden, CPU.decode_hidden):
        mixed = decode(ref.fold_queries(q, w_k), cache.pool, cache.decode_batch(), params)
        got = ref.unfold_values(mixed, w_v.transpose(1, 2), b_v)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [8, 4])
@pytest.mark.parametrize("params", PARAMS[:2])
def test_decode_projected(
    lengths: list[int], interleaved: bool, rotary_dim: int, params: AttentionParams
):
    torch.manual_seed(0)
    cache, x = _hidden_cache(lengths)
    angles = torch.rand(64, rotary_dim)
    projection = KeyProjection(
        LinearMap(torch.randn(32, 32) / 5, torch.randn(32)),
        norm=lambda k: k / k.norm(dim=-1, keepdim=True),
        rotary=Rotary(angles.cos(), angles.sin(), interleaved),
    )
    q = torch.randn(len(lengths), 4, 8)
    expected, start = [], 0
    for i, length in enumerate(lengths):
        part = x[start : start + length]
        k = ref.project_keys(part, torch.arange(length), projection, 8)
        v = part.unsqueeze(1).expand(-1, 4, -1)  # the hidden states stand for the values
        scores = torch.einsum("hd,lhd->hl", q[i], k) * params.scaling
        if params.window is not None:
            scores[:, : max(0, length - params.window)] = float("-inf")
        expected.append(torch.einsum("hl,lhd->hd", scores.softmax(-1), v))
        start += length
    wanted = torch.stack(expected)
    for decode in (ref.decode_projected, CPU.decode_projected):
        got = decode(q, cache.pool, cache.decode_batch(), params, projection)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [[1], [2, 1], [9, 3, 16], [40, 0, 2]])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("kernels", [resolve(torch.device("cpu"), torch.float32, "reference"), CPU])
def test_parts_of_a_context_join_to_the_whole(
    lengths: list[int], window: int | None, kernels: Kernels
):
    """Three parts of every third token each, as ranks hold them; some have none."""
    torch.manual_seed(0)
    projection = KeyProjection(LinearMap(torch.randn(32, 32) / 5, torch.randn(32)))
    q, folded = torch.randn(len(lengths), 4, 8), torch.randn(len(lengths), 4, 32)
    states = [torch.randn(n, 32) for n in lengths]
    geometry = make_geometry()

    def attend(states: list[Tensor], window: int | None) -> tuple[Tensor, Tensor]:
        """Of both forms, one after the other: results and sums."""
        counts = [len(x) for x in states]
        cache = PagedCache.make(geometry, counts, tier_units=geometry.hidden_units)
        empty = torch.zeros(sum(counts), 0, 8)
        ref.write_cache(cache.pool, empty, empty, torch.cat(states), cache.slots(hidden=True))
        params, batch = AttentionParams(0.3, window=window), cache.decode_batch()
        sums = torch.empty(2, len(states), 4)
        absorbed = kernels.decode_hidden(folded, cache.pool, batch, params, sums[0])
        projected = kernels.decode_projected(q, cache.pool, batch, params, projection, sums[1])
        return torch.cat((absorbed, projected)), sums.flatten(0, 1)

    whole, whole_sums = attend(states, window)
    parts = [
        attend([x[r::3] for x in states], None if window is None else window // 3) for r in range(3)
    ]
    outs, sums = (torch.stack(each) for each in zip(*parts, strict=True))
    torch.testing.assert_close(ref.join_parts(outs, sums), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.logsumexp(0), whole_sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n", "length"), [(1, 1), (7, 7), (3, 10), (16, 33)])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("params", PARAMS)
def test_attend(n: int, length: int, group: int, params: AttentionParams):
    torch.manual_seed(0)
    q = torch.randn(n, 2 * group, 8)
    k, v = torch.randn(length, 2, 8), torch.randn(length, 2, 8)
    wide = ref.attend(q.double(), k.double(), v.double(), params).float()
    torch.testing.assert_close(ref.attend(q, k, v, params), wide, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cpu.attend(q, k, v, params), wide, rtol=1e-5, atol=1e-5)


def test_rows_beyond_a_sequence_are_never_read():
    """The pool is NaN wherever nothing was written; one stray read would show."""
    cache, _, _ = _kv_cache([1, 2, 13], 4)
    q = torch.randn(3, 4, 8)
    assert CPU.decode_kv(q, cache.pool, cache.decode_batch(), PARAMS[0]).isfinite().all()


def test_packed_linears_match_plain_ones():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 8, bias=False))
    x = torch.randn(5, 24)
    wanted = model(x)
    assert CPU.pack_linears(model) == 2
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    assert model(x[:0]).shape == (0, 8)
