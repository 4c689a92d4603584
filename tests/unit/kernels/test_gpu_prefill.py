"""Attention of many rows per sequence: the kernel beside its twins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from aptserve_kernels import AttentionParams
from aptserve_kernels import reference as ref
from aptserve_kernels.gpu.prefill import attend_ragged, prefill_kv, prefill_kv8
from support.kv_caches import Kv8Cache, KvCache, make_wide_geometry, prefill_batch, starts
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3}
# Whole prompts, chunks of them, single tokens, a sequence without new tokens, and padding.
LENGTHS = [1, 150, 16, 0, 20, 33, 65]
NEW_TOKENS = [1, 40, 16, 3, 0, 1, 65]
PARAMS = [
    AttentionParams(0.2),
    AttentionParams(0.2, window=3),
    AttentionParams(0.2, softcap=2.0),
    AttentionParams(0.2, softcap=30.0, window=70),
]


@pytest.fixture(autouse=True)
def nan_in_fresh_memory() -> Iterator[None]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty returns
    yield
    torch.use_deterministic_algorithms(False)


def make_queries(cache: KvCache | Kv8Cache, new_tokens: list[int], group: int) -> Tensor:
    g = cache.paged.geometry
    return torch.randn(sum(new_tokens), g.num_kv_heads * group, g.head_dim).to(cache.pool.dtype)


def check(cache: KvCache, new_tokens: list[int], group: int, params: AttentionParams) -> None:
    q, batch = make_queries(cache, new_tokens, group), cache.prefill_batch(new_tokens)
    wanted = ref.prefill_kv(q.double(), cache.pool.double(), batch, params).to(q.dtype)
    ragged = ref.attend_ragged(q.double(), cache.k.double(), cache.v.double(), batch, params)
    assert torch.equal(ragged.to(q.dtype), wanted)
    tolerance = TOLERANCE[q.dtype]
    for got in (
        prefill_kv(q, cache.pool, batch, params),
        attend_ragged(q, cache.k, cache.v, batch, params),
    ):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("params", PARAMS)
def test_equals_its_twin(dtype: torch.dtype, group: int, params: AttentionParams) -> None:
    kv_heads = 1 if group == 8 else 2
    check(KvCache.make(LENGTHS, kv_heads=kv_heads, dtype=dtype), NEW_TOKENS, group, params)


@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_block_sizes_and_keys_in_several_units(block_size: int) -> None:
    cache = KvCache.make(LENGTHS, kv_heads=4, key_units=2, head_dim=16, block_size=block_size)
    check(cache, NEW_TOKENS, 1, PARAMS[0])


@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "dtype"),
    [
        (1, 8, 128, torch.float16),
        (2, 1, 80, torch.float16),
        (2, 1, 256, torch.float32),
        (1, 40, 64, torch.float32),  # more query heads than rows of a tile
    ],
)
def test_sizes_of_real_models(kv_heads: int, group: int, head_dim: int, dtype: torch.dtype) -> None:
    cache = KvCache.make([90, 7], kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    check(cache, [30, 7], group, AttentionParams(head_dim**-0.5))


@pytest.mark.parametrize("window", [1, 31, 32, 33, 64, 200, 10**9])
@pytest.mark.parametrize("cached", [0, 1, 100])
def test_windows_and_chunks_at_the_edges_of_tiles(window: int, cached: int) -> None:
    cache = KvCache.make([cached + 65, cached + 32], kv_heads=1, head_dim=16)
    check(cache, [65, 32], 1, AttentionParams(0.3, window=window))


def test_a_sequence_depends_on_no_other() -> None:
    cache = KvCache.make(LENGTHS)
    q, batch = make_queries(cache, NEW_TOKENS, 2), cache.prefill_batch(NEW_TOKENS)
    together = prefill_kv(q, cache.pool, batch, PARAMS[0])
    alone = replace(
        batch,
        query_starts=torch.tensor([0, 40]),
        lengths=batch.lengths[1:2],
        tables=batch.tables[1:2],
        max_queries=200,
    )
    rows = slice(1, 41)
    assert torch.equal(prefill_kv(q[rows], cache.pool, alone, PARAMS[0]), together[rows])


def test_no_rows_and_no_sequences() -> None:
    cache = KvCache.make([5, 6])
    for batch in (
        cache.prefill_batch([0, 0]),
        replace(
            cache.prefill_batch([0, 0]),
            query_starts=starts([]),
            lengths=torch.zeros(0, dtype=torch.int64),
            tables=torch.zeros(0, 1, 2, dtype=torch.int64),
        ),
    ):
        got = prefill_kv(torch.zeros(0, 4, 48), cache.pool, batch, PARAMS[0])
        assert got.shape == (0, 4, 48)


def test_views_of_a_fused_projection() -> None:
    cache = KvCache.make([20, 40])
    batch = replace(cache.prefill_batch([20, 40]))
    fused = torch.randn(60, 8, 48)
    q, k, v = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    wanted = ref.attend_ragged(q, k, v, batch, PARAMS[0])
    for got in (
        attend_ragged(q, k, v, batch, PARAMS[0]),
        attend_ragged(q, k, v.contiguous(), batch, PARAMS[0]),
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_pool_of_more_than_int32_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    # Only pages that are touched take memory: fill nothing, copy nothing onto itself.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    geometry = make_wide_geometry(kv_heads=32, head_dim=256, block_size=64, key_units=1)
    num_units = 2**31 // geometry.unit_elements + 3
    pool = torch.empty(num_units, 64, geometry.unit_width, dtype=torch.float16)
    table = torch.tensor([[[num_units - 1, num_units - 2]]])
    pool[table.view(-1)] = torch.randn(2, 64, geometry.unit_width).half()
    cache = KvCache.make([5], kv_heads=32, head_dim=256, block_size=64, dtype=torch.float16)
    batch = replace(cache.prefill_batch([3]), tables=table)
    q = make_queries(cache, [3], 1)
    got = prefill_kv(q, pool, batch, AttentionParams(0.06))
    wanted = ref.prefill_kv(q, pool, batch, AttentionParams(0.06))
    torch.testing.assert_close(got, wanted, rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("code_dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("params", [PARAMS[0], PARAMS[3]])
def test_codes(code_dtype: torch.dtype, params: AttentionParams) -> None:
    cache = Kv8Cache.make(LENGTHS, code_dtype, kv_heads=2, key_units=2)
    check_codes(cache, params)


@pytest.mark.parametrize("magnitude", [1e-4, 1e3])
def test_codes_of_values_at_the_ends_of_float16(magnitude: float) -> None:
    cache = Kv8Cache.make(LENGTHS, torch.int8, magnitude=magnitude)
    check_codes(cache, PARAMS[0], size=magnitude)


def check_codes(cache: Kv8Cache, params: AttentionParams, size: float = 1.0) -> None:
    q, batch = make_queries(cache, NEW_TOKENS, 3), prefill_batch(cache.paged, NEW_TOKENS)
    pool, scales = cache.wide()
    wanted = ref.prefill_kv8(q.float(), pool, scales, batch, params, cache.code_dtype)
    got = prefill_kv8(q, cache.pool, cache.scales, batch, params, cache.code_dtype)
    # A weight is rounded to float16, relative to the largest of its row.
    torch.testing.assert_close(got.float(), wanted, rtol=4e-3, atol=4e-3 * size)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("query_starts", {"query_starts": torch.tensor([0, 2])}),
        ("query_starts", {"query_starts": torch.tensor([0, 2, 4], dtype=torch.int32)}),
        ("lengths", {"lengths": torch.tensor([20, 40], dtype=torch.int32)}),
        ("key_starts", {"key_starts": None}),
        ("key_starts", {"key_starts": torch.tensor([0, 20])}),
    ],
)
def test_a_wrong_batch_is_named(name: str, changes: dict[str, Any]) -> None:
    cache = KvCache.make([20, 40])
    batch = replace(cache.prefill_batch([2, 2]), **changes)
    with pytest.raises(ValueError, match=f"^{name}: "):
        attend_ragged(torch.zeros(4, 4, 48), cache.k, cache.v, batch, PARAMS[0])


@pytest.mark.parametrize(("name", "shape"), [("q", (4, 3, 48)), ("q", (4, 4, 40)), ("q", (4, 192))])
def test_wrong_queries_are_named(name: str, shape: tuple[int, ...]) -> None:
    cache = KvCache.make([20, 40])
    q, batch = torch.zeros(shape), cache.prefill_batch([2, 2])
    with pytest.raises(ValueError, match=f"^{name}: "):
        prefill_kv(q, cache.pool, batch, PARAMS[0])
    with pytest.raises(ValueError, match=r"^[kq]: "):
        attend_ragged(q, cache.k, cache.v, batch, PARAMS[0])


def test_tables_fit_the_sequences() -> None:
    cache = KvCache.make([20, 40])
    batch = cache.prefill_batch([2, 2])
    batch = replace(batch, tables=batch.tables[:1])
    with pytest.raises(ValueError, match=r"^tables: "):
        prefill_kv(torch.zeros(4, 4, 48), cache.pool, batch, PARAMS[0])
