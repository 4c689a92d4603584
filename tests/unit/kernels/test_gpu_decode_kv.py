"""Decode attention over keys and values: the kernels beside their twins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from aptserve_kernels import AttentionParams, DecodeBatch
from aptserve_kernels import reference as ref
from aptserve_kernels.gpu import splits
from aptserve_kernels.gpu.decode_kv import decode_kv, decode_kv8
from support.kv_caches import Kv8Cache, KvCache, make_wide_geometry
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LENGTHS = [1, 16, 0, 17, 150, 64, 31]
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


def make_queries(cache: KvCache | Kv8Cache, group: int) -> Tensor:
    g = cache.paged.geometry
    q = torch.randn(len(cache.paged.lengths), g.num_kv_heads * group, g.head_dim)
    return q.to(cache.pool.dtype)


def check(cache: KvCache, group: int, params: AttentionParams) -> None:
    q, batch = make_queries(cache, group), cache.paged.decode_batch()
    wanted = ref.decode_kv(q.double(), cache.pool.double(), batch, params)
    got = decode_kv(q, cache.pool, batch, params)
    tolerance = TOLERANCE[q.dtype]
    torch.testing.assert_close(got, wanted.to(q.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("params", PARAMS)
def test_equals_its_twin(dtype: torch.dtype, group: int, params: AttentionParams) -> None:
    check(KvCache.make(LENGTHS, dtype=dtype), group, params)


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("group", [1, 3])
def test_block_sizes_and_keys_in_several_units(block_size: int, group: int) -> None:
    cache = KvCache.make(LENGTHS, kv_heads=4, key_units=2, head_dim=16, block_size=block_size)
    check(cache, group, PARAMS[0])


@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "dtype"),
    [
        (3, 1, 128, torch.float16),
        (2, 1, 64, torch.bfloat16),  # no product of matrices, which the interpreter gets wrong
        (2, 8, 128, torch.float16),
        (2, 1, 80, torch.float32),
        (1, 20, 256, torch.float32),  # more query heads than a program takes
    ],
)
def test_sizes_of_real_models(kv_heads: int, group: int, head_dim: int, dtype: torch.dtype) -> None:
    cache = KvCache.make([300, 7], kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    check(cache, group, AttentionParams(head_dim**-0.5))


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("wanted_programs", [1, 50, 10**6])
def test_any_number_of_parts(
    group: int, wanted_programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splits, "_WANTED_PROGRAMS", wanted_programs)
    for params in (PARAMS[0], PARAMS[3]):
        check(KvCache.make([0, 1, 500, 64, 65, 200], kv_heads=1), group, params)


def test_parts_fill_a_gpu_and_are_not_too_short() -> None:
    assert splits.num_splits(num_programs=40, capacity=4096, window=None) == 26
    assert splits.num_splits(num_programs=1, capacity=10**6, window=None) == 64
    assert splits.num_splits(num_programs=40, capacity=200, window=None) == 4
    assert splits.num_splits(num_programs=40, capacity=4096, window=100) == 2
    assert splits.num_splits(num_programs=2000, capacity=4096, window=None) == 1


@pytest.mark.parametrize("group", [1, 4])
def test_padding_of_a_captured_graph_gives_zeros(group: int) -> None:
    cache = KvCache.make([0, 0])
    tables = torch.zeros(2, 20, cache.geometry.kv_units, dtype=torch.int64)
    batch = replace(cache.paged.decode_batch(), tables=tables)
    got = decode_kv(make_queries(cache, group), cache.pool, batch, PARAMS[0])
    assert torch.equal(got, torch.zeros_like(got))


def test_an_empty_batch() -> None:
    cache = KvCache.make([5])
    tables, lengths = cache.paged.decode_batch().tables[:0], torch.zeros(0, dtype=torch.int64)
    batch = DecodeBatch(tables, lengths, cache.geometry)
    assert decode_kv(make_queries(cache, 1)[:0], cache.pool, batch, PARAMS[0]).shape == (0, 2, 48)


@pytest.mark.parametrize("group", [1, 2])
def test_views_of_a_fused_projection_and_of_a_larger_table(group: int) -> None:
    cache = KvCache.make([20, 40])
    batch = cache.paged.decode_batch()
    larger = torch.full((2, 9, cache.geometry.kv_units), -1)
    larger[:, :3] = batch.tables
    fused = torch.randn(2, 3, 2 * group, 48)
    q = fused[:, 1]
    got = decode_kv(q, cache.pool, replace(batch, tables=larger[:, :3]), PARAMS[0])
    wanted = ref.decode_kv(q.contiguous(), cache.pool, batch, PARAMS[0])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", [1, 2])
def test_a_pool_of_more_than_int32_elements(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Only pages that are touched take memory: fill nothing, copy nothing onto itself.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    geometry = make_wide_geometry(kv_heads=64, head_dim=128, block_size=64, key_units=1)
    num_units = 2**31 // geometry.unit_elements + 3
    pool = torch.empty(num_units, 64, geometry.unit_width, dtype=torch.float16)
    table = torch.tensor([[[num_units - 1, num_units - 2]]])
    pool[table.view(-1)] = torch.randn(2, 64, geometry.unit_width).half()
    batch = DecodeBatch(table, torch.tensor([5]), geometry)
    q = torch.randn(1, 64 * group, 128).half()
    params = AttentionParams(0.09)
    got, wanted = decode_kv(q, pool, batch, params), ref.decode_kv(q, pool, batch, params)
    torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("code_dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("params", [PARAMS[0], PARAMS[3]])
def test_codes(code_dtype: torch.dtype, group: int, params: AttentionParams) -> None:
    cache = Kv8Cache.make(LENGTHS, code_dtype, kv_heads=4, key_units=2)
    check_codes(cache, group, params)


@pytest.mark.parametrize("magnitude", [1e-4, 1e3])
def test_codes_of_values_at_the_ends_of_float16(magnitude: float) -> None:
    cache = Kv8Cache.make(LENGTHS, torch.int8, magnitude=magnitude)
    check_codes(cache, 4, PARAMS[0], size=magnitude)


def check_codes(cache: Kv8Cache, group: int, params: AttentionParams, size: float = 1.0) -> None:
    q, batch = make_queries(cache, group), cache.paged.decode_batch()
    pool, scales = cache.wide()
    wanted = ref.decode_kv8(q.float(), pool, scales, batch, params, cache.code_dtype)
    got = decode_kv8(q, cache.pool, cache.scales, batch, params, cache.code_dtype)
    # A weight is rounded to float16, relative to the largest of its row.
    torch.testing.assert_close(got.float(), wanted, rtol=4e-3, atol=4e-3 * size)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("q", {"q": torch.zeros(2, 3, 48)}),
        ("q", {"q": torch.zeros(2, 4, 32)}),
        ("q", {"q": torch.zeros(2, 4, 48, dtype=torch.float16)}),
        ("q", {"q": torch.zeros(2, 48, 4).transpose(1, 2)}),
        ("q", {"q": torch.zeros(2, 4, 50)[..., :48]}),
        ("pool", {"pool": torch.zeros(9, 16, 90)}),
        ("tables", {"tables": torch.zeros(2, 3, 1, dtype=torch.int64)}),
        ("tables", {"tables": torch.zeros(2, 3, 2, dtype=torch.int32)}),
        ("tables", {"tables": torch.zeros(1, 3, 2, dtype=torch.int64)}),
        ("lengths", {"lengths": torch.zeros(3, dtype=torch.int64)}),
    ],
)
def test_a_wrong_layout_is_named(name: str, changes: dict[str, Tensor]) -> None:
    cache = KvCache.make([20, 40])
    batch = cache.paged.decode_batch()
    batch = replace(
        batch,
        tables=changes.get("tables", batch.tables),
        lengths=changes.get("lengths", batch.lengths),
    )
    q, pool = changes.get("q", torch.zeros(2, 4, 48)), changes.get("pool", cache.pool)
    with pytest.raises(ValueError, match=f"^{name}: "):
        decode_kv(q, pool, batch, PARAMS[0])


def test_codes_stand_beside_16_bits_only() -> None:
    cache = Kv8Cache.make([20], torch.int8)
    pool, scales = cache.wide()
    with pytest.raises(ValueError, match=r"^pool: "):
        decode_kv8(
            make_queries(cache, 1).float(),
            pool,
            scales,
            cache.paged.decode_batch(),
            PARAMS[0],
            torch.int8,
        )
