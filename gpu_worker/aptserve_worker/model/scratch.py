"""How much memory steps take beside weights and pool, measured by running the largest there can be.

What a forward pass allocates follows from shapes alone, so the steps run on made-up sequences that
share one block and write nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from aptserve_kernels import PrefillBatch, WriteSlots
from torch import Tensor

from aptserve_worker.model.attention import AttentionStep, DecodeRows, PrefillRows
from aptserve_worker.model.step import decode_batch
from aptserve_worker.parallel.shard import Shard
from aptserve_worker.plan import Tier

Meter = Callable[[Callable[[], object]], int]
"""From something to run to the bytes that it had allocated at most."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest step: sequences, new tokens, and tokens of one sequence."""

    max_num_seqs: int
    max_num_batched_tokens: int
    context_length: int


def scratch_bytes(
    forward: Callable[[Tensor, Tensor, AttentionStep, Tensor], Tensor],
    shard: Shard,
    units_per_block: Mapping[Tier, int],
    limits: Limits,
    device: torch.device,
    meter: Meter,
) -> int:
    """Bytes that the hungriest of the largest steps allocates: prompts, decodes of each tier."""
    steps = [_prompts(shard, limits, device)]
    steps += _decodes(shard, units_per_block, limits, device)
    return max(meter(lambda step=step: forward(*step)) for step in steps)  # type: ignore[misc]


def _prompts(
    shard: Shard, limits: Limits, device: torch.device
) -> tuple[Tensor, Tensor, AttentionStep, Tensor]:
    """As many tokens as a step may have, in prompts as long as they can be."""
    total = limits.max_num_batched_tokens
    longest = min(total, limits.context_length)
    counts = [longest] * (total // longest) + [total % longest] * (total % longest > 0)
    starts = torch.tensor([0, *counts], dtype=torch.int64).cumsum(0).to(device)
    batch = PrefillBatch(
        query_starts=starts,
        lengths=starts.diff(),
        tables=torch.zeros(len(counts), 0, 1, dtype=torch.int64, device=device),
        geometry=shard.kv,
        max_queries=longest,
        key_starts=starts,
    )
    step = AttentionStep(_no_slots(device), prompts=PrefillRows(0, total, batch))
    positions = torch.arange(total, device=device) % longest
    rows = torch.arange(min(limits.max_num_seqs, total), device=device)
    return torch.zeros_like(positions), positions, step, rows


def _decodes(
    shard: Shard,
    units_per_block: Mapping[Tier, int],
    limits: Limits,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor, AttentionStep, Tensor]]:
    """For each tier as many sequences as there may be, as long as they can be."""
    count = min(limits.max_num_seqs, limits.max_num_batched_tokens)
    num_blocks = shard.num_blocks(limits.context_length)
    lengths = torch.full((count,), limits.context_length, dtype=torch.int64, device=device)
    rows = torch.arange(count, device=device)
    for tier, units in units_per_block.items():
        tables = torch.zeros(count, num_blocks, units, dtype=torch.int64, device=device)
        batch = decode_batch(tier, tables, lengths, shard)
        decodes = {tier: DecodeRows(0, count, batch)}
        step = AttentionStep(_no_slots(device), decodes)
        yield torch.zeros_like(rows), lengths - 1, step, rows


def _no_slots(device: torch.device) -> WriteSlots:
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return WriteSlots(none, none, none, none, none)


def cuda_meter(device: torch.device) -> Meter:
    """Measures with the allocator of PyTorch."""

    def measure(run: Callable[[], object]) -> int:
        run()  # what is allocated once and for all, such as workspaces of libraries, is not scratch
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    return measure
