"""The memory that steps need is found by running the largest of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from aptserve_worker.cache.pool import choose_num_units
from aptserve_worker.model.scratch import Limits, scratch_bytes
from support.engines import make_engine


def test_the_largest_steps_are_run(checkpoint: Callable[[str], Path]) -> None:
    runner = make_engine(checkpoint("opt"))._runner
    sizes: list[tuple[int, ...]] = []

    def meter(run: Callable[[], object]) -> int:
        logits = run()
        assert isinstance(logits, torch.Tensor)
        sizes.append(tuple(logits.shape))
        return len(sizes)

    limits = Limits(max_num_seqs=6, max_num_batched_tokens=150, context_length=64)
    found = scratch_bytes(
        runner.forward, runner.shard, runner.units_per_block, limits, runner.device, meter
    )
    assert found == len(sizes) == 3  # prompts, decodes in KV, decodes over hidden states
    assert {rows for rows, _ in sizes} == {6}
    assert all(not layer.any() for layer in runner.pool.layers)  # nothing was written


def test_a_pool_takes_what_is_asked_for_else_what_is_left() -> None:
    assert choose_num_units(100, units=7, memory=None, left=lambda: 1 / 0) == 7
    assert choose_num_units(100, units=None, memory=999, left=lambda: 1 / 0) == 9
    assert choose_num_units(100, units=None, memory=None, left=lambda: 555) == 5
    assert choose_num_units(2**20, units=None, memory=None) == 512


def test_too_little_memory_names_what_to_lower() -> None:
    with pytest.raises(ValueError, match=r"-3 MiB are left .* lower max_num_batched_tokens"):
        choose_num_units(100, units=None, memory=None, left=lambda: -3 * 2**20)
