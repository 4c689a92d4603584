"""The kernel that stores new tokens as codes, against the torch form: equal in every bit."""

from __future__ import annotations

import pytest
import torch
from aptserve_kernels import UnitGeometry, quantised
from aptserve_kernels.gpu.write_kv8 import write_kv8
from support.caches import make_geometry
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GEOMETRIES = {
    "one unit": make_geometry(heads=4, head_dim=16),
    "several units": make_geometry(heads=4, head_dim=8, hidden=48),
    "odd head": make_geometry(heads=3, head_dim=24, block_size=16),
    "real": make_geometry(heads=8, head_dim=128, hidden=4096, block_size=16),
}
NUM_UNITS = 40


def _vectors(rows: int, geometry: UnitGeometry, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K and V of many magnitudes, zeros and halves of codes among them; parts of one tensor."""
    g = geometry
    fused = torch.randn(rows, g.num_kv_heads, 2 * g.head_dim)
    fused *= 10.0 ** torch.randint(-6, 4, (rows, g.num_kv_heads, 1))
    fused[0] = 0.0
    fused[1] = torch.arange(2 * g.head_dim) % 40 + 0.5
    fused[1, :, :: g.head_dim] = 127.0
    k, v = fused.to(dtype).split(g.head_dim, -1)
    return k, v


def _slots(rows: int, geometry: UnitGeometry) -> Tensor:
    """A different place for each vector, nothing for some."""
    places = NUM_UNITS * geometry.heads_per_unit * geometry.block_size
    slots = torch.randperm(places)[: rows * geometry.num_kv_heads]
    slots[::5] = -1
    return slots


def _codes(rows: int, geometry: UnitGeometry, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K and V that are e4m3 codes, the largest among them, times a power of two."""
    g = geometry
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = every[every.isfinite()]
    chosen = finite[torch.randint(len(finite), (rows, g.num_kv_heads, 2 * g.head_dim))]
    chosen[..., :: g.head_dim] = 448.0
    chosen *= 2.0 ** torch.randint(-10, 4, (rows, g.num_kv_heads, 1))
    k, v = chosen.to(dtype).split(g.head_dim, -1)
    return k, v


def _check_equal(
    geometry: UnitGeometry, vectors: tuple[Tensor, Tensor], code_dtype: torch.dtype
) -> None:
    g, (k, v) = geometry, vectors
    slots = _slots(len(k), g)
    pools, scales = [], []
    for write in (write_kv8, quantised.write_kv8):
        pools.append(torch.full((NUM_UNITS, g.block_size, g.unit_width), torch.nan).to(k.dtype))
        scales.append(quantised.new_scales(NUM_UNITS, g, k.device).fill_(torch.nan))
        write(pools[-1], scales[-1], k, v, slots, g, code_dtype)
    assert torch.equal(scales[0].view(torch.int16), scales[1].view(torch.int16))
    assert torch.equal(pools[0].view(torch.int8), pools[1].view(torch.int8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("rows", [2, 9])
def test_int8(geometry: UnitGeometry, rows: int, dtype: torch.dtype):
    torch.manual_seed(0)
    _check_equal(geometry, _vectors(rows, geometry, dtype), torch.int8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_e4m3(geometry: UnitGeometry, dtype: torch.dtype):
    # Quotients need no rounding here: Triton's interpreter rounds to e4m3 wrongly (a GPU does not).
    torch.manual_seed(0)
    _check_equal(geometry, _codes(9, geometry, dtype), torch.float8_e4m3fn)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_nan_does_not_come_out_sound():
    geometry = make_geometry(heads=1, head_dim=16)
    pool, scales = torch.zeros(2, 4, 16), quantised.new_scales(2, geometry, torch.device("cpu"))
    k = torch.randn(2, 1, 16)
    k[1, 0, 3] = float("nan")
    write_kv8(pool, scales, k, k, torch.tensor([4, 5]), geometry, torch.int8)
    got_k, got_v = quantised.gather_kv8(pool, scales, torch.tensor([[1]]), 2, geometry, torch.int8)
    for got in (got_k, got_v):
        torch.testing.assert_close(got[0], k[0], rtol=0.0, atol=float(k[0].abs().max()) / 250)
        assert bool(got[1].isnan().all())


def test_what_breaks_the_contract_is_named():
    geometry = make_geometry(heads=2, head_dim=16)
    pool, scales = torch.zeros(3, 4, 32), quantised.new_scales(3, geometry, torch.device("cpu"))
    k, slots = torch.zeros(2, 2, 16), torch.arange(4)
    cases = [
        ("dtype", pool, scales, k, slots, torch.int16),
        ("pool", pool[:, :2], scales, k, slots, torch.int8),
        ("scales", pool, scales.float(), k, slots, torch.int8),
        ("scales", pool, scales[:2], k, slots, torch.int8),
        ("k", pool, scales, k.half(), slots, torch.int8),
        ("k", pool, scales, k[:, :1], slots, torch.int8),
        ("slots", pool, scales, k, slots[:3], torch.int8),
    ]
    for name, wrong_pool, wrong_scales, keys, places, dtype in cases:
        with pytest.raises(ValueError, match=f"^{name}: "):
            write_kv8(wrong_pool, wrong_scales, keys, keys, places, geometry, dtype)
