"""Decode attention of one layer over KV, over hidden states absorbed, and re-projected.

"Re-projected" is what a hidden cache costs without the folding: keys and values of every cached
token are computed again in each step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from aptserve_kernels import AttentionParams, DecodeBatch, UnitGeometry, resolve
from aptserve_kernels.reference import attend, fold_queries, gather_hidden, unfold_values
from torch import Tensor

from benchmarks.common import describe_machine, spread

HEADS, HEAD_DIM = 12, 64
SEQUENCES, CONTEXT, BLOCK = 16, 512, 16


def measure(rounds: int = 9) -> dict[str, Any]:
    """Milliseconds per layer and step, interleaved; d = 768, float32."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    hidden = HEADS * HEAD_DIM
    kernels = resolve(torch.device("cpu"), torch.float32)
    geometry = UnitGeometry.of(
        block_size=BLOCK, num_kv_heads=HEADS, head_dim=HEAD_DIM, hidden_size=hidden
    )
    params = AttentionParams(HEAD_DIM**-0.5)
    blocks = CONTEXT // BLOCK
    kv_tables = torch.randperm(SEQUENCES * blocks * 2).view(SEQUENCES, blocks, 2)
    hidden_tables = torch.randperm(SEQUENCES * blocks).view(SEQUENCES, blocks, 1)
    lengths = torch.full((SEQUENCES,), CONTEXT)
    pool = torch.randn(SEQUENCES * blocks * 2, BLOCK, hidden)
    q = torch.randn(SEQUENCES, HEADS, HEAD_DIM)
    key, value = torch.randn(hidden, hidden) / 28, torch.randn(hidden, hidden) / 28
    key_heads = key.view(HEADS, HEAD_DIM, hidden)
    value_heads = value.view(HEADS, HEAD_DIM, hidden).transpose(1, 2)

    def over_kv() -> Tensor:
        return kernels.decode_kv(q, pool, DecodeBatch(kv_tables, lengths, geometry), params)

    def absorbed() -> Tensor:
        batch = DecodeBatch(hidden_tables, lengths, geometry)
        mixed = kernels.decode_hidden(fold_queries(q, key_heads), pool, batch, params)
        return unfold_values(mixed, value_heads, None)

    def reprojected() -> Tensor:
        out = []
        for i in range(SEQUENCES):
            x = gather_hidden(pool, hidden_tables[i], CONTEXT, geometry)
            k = (x @ key.T).view(CONTEXT, HEADS, HEAD_DIM)
            v = (x @ value.T).view(CONTEXT, HEADS, HEAD_DIM)
            out.append(attend(q[i : i + 1], k, v, params)[0])
        return torch.stack(out)

    torch.testing.assert_close(absorbed(), reprojected(), rtol=1e-3, atol=1e-3)
    times = _interleaved({"kv": over_kv, "absorbed": absorbed, "reprojected": reprojected}, rounds)
    return {
        "machine": describe_machine(),
        "shape": f"d = {hidden}, {HEADS} heads, {SEQUENCES} sequences x {CONTEXT} cached tokens",
        "milliseconds_per_layer": {name: spread(values) for name, values in times.items()},
    }


def _interleaved(cases: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            started = time.perf_counter()
            case()
            times[name].append((time.perf_counter() - started) * 1e3)
    return times
