"""What the device reaches at best: bytes per second of a copy, FLOP per second of a product."""

from __future__ import annotations

from typing import Any

import torch
from aptserve_kernels.costs import Gpu

from benchmarks.gpu_check.context import Context

_COPY_BYTES, _DRY_COPY_BYTES = 2 << 30, 1 << 16
_PRODUCT_SIZES, _DRY_PRODUCT_SIZES = (4096, 8192), (64,)


def measure(context: Context) -> dict[str, Any]:
    """Best of some sizes, each a median; bytes of a copy count as read and as written."""
    bandwidth = _copy(context)
    flops = max(_product(context, size) for size in _sizes(context))
    context.ceilings = Gpu(bandwidth, flops)
    context.say(f"  copy {bandwidth / 1e9:,.0f} GB/s, product {flops / 1e12:,.1f} TFLOP/s (bf16)")
    return {"copy_bytes_per_second": bandwidth, "bfloat16_flop_per_second": flops}


def _sizes(context: Context) -> tuple[int, ...]:
    return _DRY_PRODUCT_SIZES if context.is_dry else _PRODUCT_SIZES


def _copy(context: Context) -> float:
    size = _DRY_COPY_BYTES if context.is_dry else min(_COPY_BYTES, context.free_bytes() // 4)
    source = torch.ones(size, dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    return 2 * size / context.timer(lambda: target.copy_(source)).median


def _product(context: Context, size: int) -> float:
    # Of random numbers: with zeros a GPU draws less power and is faster than it ever will be.
    left, right = torch.randn(2, size, size, device=context.device, dtype=torch.bfloat16)
    out = torch.empty_like(left)
    return 2 * size**3 / context.timer(lambda: torch.mm(left, right, out=out)).median
