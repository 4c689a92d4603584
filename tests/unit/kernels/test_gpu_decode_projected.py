"""Decode attention with projected keys: the Triton kernel against its torch twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from aptserve_kernels import AttentionParams, KeyProjection, LinearMap, Rotary
from aptserve_kernels import reference as ref
from aptserve_kernels.batch import HeadNorm
from aptserve_kernels.gpu.decode_projected import decode_projected
from support.caches import PagedCache, make_geometry
from torch import Tensor

PLAIN = AttentionParams(0.3)
PARAMS = [PLAIN, AttentionParams(0.3, softcap=2.0), AttentionParams(0.3, window=70, softcap=1.5)]
LENGTHS = [1, 16, 65, 150]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}
Norm = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _seeded_and_empty_tensors_full_of_nan() -> Iterator[None]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Case:
    """A filled cache, queries and a projection, in one dtype."""

    cache: PagedCache
    q: Tensor
    projection: KeyProjection

    @classmethod
    def make(
        cls,
        lengths: list[int],
        *,
        kv_heads: int = 4,
        group: int = 1,
        head_dim: int = 16,
        hidden: int | None = None,
        block_size: int = 16,
        rotary_dim: int | None = None,
        is_interleaved: bool = False,
        has_bias: bool = True,
        norm: Norm | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Case:
        g = make_geometry(heads=kv_heads, head_dim=head_dim, hidden=hidden, block_size=block_size)
        cache = PagedCache.make(g, lengths, tier_units=g.hidden_units, dtype=dtype)
        x = torch.randn(sum(lengths), g.hidden_size, dtype=dtype)
        empty = torch.zeros(sum(lengths), 0, head_dim, dtype=dtype)
        ref.write_cache(cache.pool, empty, empty, x, cache.slots(hidden=True))
        width = kv_heads * head_dim
        weight = torch.randn(width, g.hidden_size) / g.hidden_size**0.5
        bias = torch.randn(width).to(dtype) if has_bias else None
        rotary = None
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if rotary_dim:
            angles = torch.rand(max(lengths), rotary_dim) * 6
            rotary = Rotary(angles.cos().to(dtype), angles.sin().to(dtype), is_interleaved)
        return cls(
            cache,
            torch.randn(len(lengths), kv_heads * group, head_dim, dtype=dtype),
            KeyProjection(LinearMap(weight.to(dtype), bias), norm, rotary),
        )

    def run(self, params: AttentionParams, log_sums: Tensor | None = None) -> Tensor:
        batch, pool = self.cache.decode_batch(), self.cache.pool
        return decode_projected(self.q, pool, batch, params, self.projection, log_sums)

    def check(self, params: AttentionParams = PLAIN) -> None:
        p, batch = self.projection, self.cache.decode_batch()
        bias = None if p.map.bias is None else p.map.bias.double()
        wide = KeyProjection(LinearMap(p.map.weight.double(), bias), p.norm, p.rotary)
        wanted_sums, sums = torch.empty(2, *self.q.shape[:2]).unbind()
        wanted = ref.decode_projected(
            self.q.double(), self.cache.pool.double(), batch, params, wide, wanted_sums
        )
        got = self.run(params, sums)
        assert got.dtype == self.q.dtype
        tolerance = TOLERANCE[self.q.dtype]
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(sums, wanted_sums, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("is_interleaved", [False, True])
def test_ragged_batches(params: AttentionParams, is_interleaved: bool):
    Case.make(LENGTHS, is_interleaved=is_interleaved).check(params)


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [0, 8, 24])
def test_rotation_of_part_of_a_head(is_interleaved: bool, rotary_dim: int):
    Case.make(
        [33, 2], kv_heads=3, head_dim=24, rotary_dim=rotary_dim, is_interleaved=is_interleaved
    ).check()


@pytest.mark.parametrize("group", [4, 8])
def test_queries_that_share_keys(group: int):
    Case.make([40, 3], kv_heads=2, group=group).check(PARAMS[2])


@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_block_sizes_and_bias(block_size: int, has_bias: bool):
    Case.make([70], block_size=block_size, has_bias=has_bias, dtype=torch.float16).check()


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_real_head_sizes(head_dim: int, dtype: torch.dtype):
    """Four heads of 80 elements are three for one program and one for another."""
    norm = HeadNorm(torch.rand(head_dim) + 0.5, 1e-5)
    case = Case.make(
        [20], kv_heads=4 if head_dim == 80 else 2, head_dim=head_dim, norm=norm, dtype=dtype
    )
    case.check(AttentionParams(head_dim**-0.5))


def test_states_in_several_units():
    """Keys of 96 elements beside hidden states of 144, which lie in three units."""
    case = Case.make([50, 7], kv_heads=4, head_dim=24, hidden=144)
    assert case.cache.geometry.hidden_units == 3
    case.check(PARAMS[2])


@pytest.mark.parametrize("is_interleaved", [False, True])
def test_norm_of_each_head(is_interleaved: bool):
    norm = HeadNorm(torch.rand(16) + 0.5, 1e-5)
    Case.make([33, 130], norm=norm, is_interleaved=is_interleaved, rotary_dim=8).check(PARAMS[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_other_norm(dtype: torch.dtype):
    def over_all_heads(k: Tensor) -> Tensor:
        return k / k.flatten(-2).norm(dim=-1)[:, None, None] * 8

    Case.make([33, 130], kv_heads=3, norm=over_all_heads, dtype=dtype).check(PARAMS[2])


def test_many_tiles_keep_their_places():
    """More tiles than stand side by side, more heads than one program has."""
    Case.make([40, 70, 129, 5, 64, 33, 2, 1, 90, 12], kv_heads=9).check()


@pytest.mark.parametrize("norm", [None, lambda k: k])
def test_sequences_without_tokens_give_zeros(norm: Norm | None):
    case = Case.make([5, 0, 40], norm=norm)
    got = case.run(PLAIN)
    assert torch.equal(got[1], torch.zeros_like(got[1]))
    assert got.isfinite().all()


def test_slices_of_fused_weights_and_queries():
    case = Case.make([33])
    wanted = case.run(PLAIN)
    weight, q = case.projection.map.weight, case.q
    fused = torch.randn(3 * weight.shape[0], weight.shape[1])
    fused[64:128] = weight
    case.projection = replace(
        case.projection, map=LinearMap(fused[64:128], case.projection.map.bias)
    )
    case.q = torch.stack((q, q), 2)[:, :, 0]
    assert torch.equal(case.run(PLAIN), wanted)


def test_layouts_that_do_not_fit_are_refused():
    case = Case.make([5])
    projection = case.projection
    weight, rotary = projection.map.weight, projection.rotary

    def refuses(match: str, **changes: Any) -> None:
        case.projection = replace(projection, **changes)
        with pytest.raises(ValueError, match=match):
            case.run(PLAIN)

    refuses("map.weight: strides", map=LinearMap(weight.t().contiguous().t()))
    refuses("map.weight: expected", map=LinearMap(weight[:32]))
    refuses("map.bias", map=LinearMap(weight, torch.zeros(3)))
    refuses("rotary: cos and sin", rotary=Rotary(rotary.cos, rotary.sin.t().contiguous().t()))
    refuses("rotary: 32 elements", rotary=Rotary(torch.ones(5, 32), torch.ones(5, 32)))
    refuses("norm: expected", norm=HeadNorm(torch.ones(3), 1e-5))
    case.projection, case.q = projection, case.q[:, :3]
    with pytest.raises(ValueError, match="q: 3 heads"):
        case.run(PLAIN)
