"""The formulas of costs against numbers worked out by hand, and the table made from them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from aptserve_kernels import costs
from aptserve_kernels.costs import GPUS, Cost, Gpu, Shape

from benchmarks import kernel_costs

OPT_13B = Shape(
    batch=1, context=1000, num_heads=40, num_kv_heads=40, head_dim=128, hidden_size=5120
)
LLAMA_3_8B = replace(OPT_13B, num_heads=32, num_kv_heads=8, hidden_size=4096)
LAYERS = 40
SMALL = Shape(
    batch=2,
    context=20,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_size=16,
    new_tokens=5,
)
"""Two blocks of 16 per sequence; keys and values of 16 elements each."""


def test_memory_per_token() -> None:
    assert LAYERS * costs.kv_token_bytes(OPT_13B) == 800 * 1024
    assert LAYERS * costs.hidden_token_bytes(OPT_13B) == 400 * 1024
    assert LAYERS * costs.kv8_token_bytes(OPT_13B) == 400 * 1024 + 40 * 2 * 40 * 2
    assert 32 * costs.kv_token_bytes(LLAMA_3_8B) == 128 * 1024


def test_reprojecting_a_thousand_tokens_takes_longer_than_reading_their_keys() -> None:
    per_token = LAYERS * costs.promote(OPT_13B).flop / 1000
    assert per_token == 40 * 4 * 5120**2  # 4.19 GFLOP
    a100, h100 = GPUS["A100-40G"], GPUS["H100"]
    milliseconds = 1e3 * LAYERS * costs.roofline_seconds(costs.decode_reprojected(OPT_13B), a100)
    assert 13 < milliseconds < 17
    milliseconds = 1e3 * LAYERS * costs.roofline_seconds(costs.decode_kv(OPT_13B), a100)
    assert milliseconds == pytest.approx(0.53, abs=0.01)
    milliseconds = 1e3 * LAYERS * costs.roofline_seconds(costs.decode_kv(OPT_13B), h100)
    assert milliseconds == pytest.approx(0.24, abs=0.01)


def test_absorbed_attention_is_bound_by_memory() -> None:
    cost = costs.decode_hidden(OPT_13B)
    assert LAYERS * cost.flop / 1000 == pytest.approx(32.8e6, rel=1e-3)
    assert 0.9 * 40 < cost.intensity < 40  # as many as heads, less what is not hidden states
    for gpu in GPUS.values():
        assert costs.bound(cost, gpu) == "memory"
        seconds = costs.roofline_seconds(cost, gpu)
        assert seconds / costs.roofline_seconds(costs.decode_kv(OPT_13B), gpu) < 1.1


def test_absorbed_attention_with_more_heads_than_the_ridge_is_bound_by_arithmetic() -> None:
    many = replace(OPT_13B, num_heads=256, num_kv_heads=256, hidden_size=256 * 128)
    assert costs.bound(costs.decode_hidden(many), GPUS["A100-80G"]) == "compute"
    assert costs.bound(costs.decode_hidden(many), GPUS["H100"]) == "memory"


def test_projected_keys_take_half_of_the_arithmetic_of_reprojection() -> None:
    projected, again = costs.decode_projected(OPT_13B), costs.decode_reprojected(OPT_13B)
    assert projected.flop == pytest.approx(again.flop / 2, rel=0.01)
    assert projected.flop / 1000 == 2 * 5120**2 + 2 * 5120 + 2 * 40 * 5120
    assert costs.bound(projected, GPUS["H100"]) == "compute"


def test_an_eight_bit_cache_is_read_in_half_the_bytes() -> None:
    plain, codes = costs.decode_kv(LLAMA_3_8B), costs.decode_kv8(LLAMA_3_8B)
    assert codes.flop == plain.flop
    assert codes.bytes / plain.bytes == pytest.approx(0.5, abs=0.02)


def test_prefill_counts_the_pairs_that_are_seen() -> None:
    cost = costs.prefill(SMALL)
    pairs = 2 * sum(range(16, 21))  # the new tokens see 16 to 20
    assert cost.flop == 4 * 32 * pairs
    assert cost.write_bytes == 2 * 5 * 32 * 2
    assert cost.read_bytes == 2 * 5 * 32 * 2 + 2 * 20 * 64 + 2 * 2 * 2 * 8


def test_writes() -> None:
    rows = 2 * 5
    assert costs.write_kv(SMALL) == Cost(rows * (64 + 2 * 2 * 8), rows * 64, 0)
    assert costs.write_hidden(SMALL) == Cost(rows * (32 + 8), rows * 32, 0)
    assert costs.write_kv8(SMALL) == Cost(rows * (64 + 2 * 8), rows * (32 + 2 * 2 * 2), 0)


def test_decode_of_a_small_batch() -> None:
    rows, tables = 2 * 32 * 2, 2 * 2 * 8
    assert costs.decode_kv(SMALL) == Cost(rows + 40 * 64 + 2 * tables, rows, 4 * 40 * 32)
    hidden = costs.decode_hidden(SMALL)
    wide = 2 * 4 * 16 * 2
    assert hidden.read_bytes == wide + 2 * 40 * 32 + 2 * tables + 40 * 4 * 2
    assert hidden.write_bytes == wide + 40 * 4 * 2
    assert hidden.flop == 4 * 40 * 4 * 16


def test_splits_write_and_read_partial_results() -> None:
    kv = 2 * 3 * 4 * (8 + 1) * 4
    assert costs.decode_kv(SMALL, 3) == costs.decode_kv(SMALL) + Cost(kv, kv, 0)
    hidden = 2 * 3 * 4 * (16 + 1) * 4
    assert costs.decode_hidden(SMALL, 3) == costs.decode_hidden(SMALL) + Cost(hidden, hidden, 0)


def test_folding_reads_the_weights_once() -> None:
    weights, narrow, wide = 16 * 32 * 2, 2 * 32 * 2, 2 * 4 * 16 * 2
    assert costs.fold(SMALL) == Cost(weights + narrow, wide, 2 * 2 * 16 * 32)
    assert costs.unfold(SMALL) == Cost(weights + wide, narrow, 2 * 2 * 16 * 32)


def test_a_gather_reads_and_writes_states_once() -> None:
    assert costs.gather_hidden(SMALL) == Cost(40 * 32 + 2 * 2 * 8, 40 * 32, 0)


def test_promotion_copies_before_and_after_the_products() -> None:
    weights, tables = 2 * 16 * 16 * 2, 2 * 2 * (1 + 2) * 8
    cost = costs.promote(SMALL)
    assert cost.read_bytes == 2 * 40 * 32 + weights + 40 * 64 + tables
    assert cost.write_bytes == 40 * 32 + 2 * 40 * 64
    assert cost.flop == 40 * 4 * 16**2


def test_sampling_reads_every_logit_from_memory_once() -> None:
    assert costs.sample(3, 100) == Cost(3 * 100 * 4, 3 * 8, 2 * 300)
    assert costs.sample(3, 100, passes=4) == Cost(3 * 100 * 4, 3 * 8, 4 * 2 * 300)


def test_the_roofline_is_the_longer_of_both() -> None:
    gpu = Gpu(bandwidth=10.0, flops=100.0)
    assert gpu.ridge == 10.0
    memory, compute = Cost(15, 5, 100), Cost(15, 5, 400)
    assert (costs.roofline_seconds(memory, gpu), costs.bound(memory, gpu)) == (2.0, "memory")
    assert (costs.roofline_seconds(compute, gpu), costs.bound(compute, gpu)) == (4.0, "compute")


def test_the_kept_tables_are_what_the_formulas_give() -> None:
    result = kernel_costs.measure()
    kept = (kernel_costs.RESULTS / "kernel_costs.json").read_text()
    assert json.loads(kept) == json.loads(json.dumps(result))
    kept = (kernel_costs.RESULTS / "kernel_costs.md").read_text()
    assert kept == kernel_costs.markdown(result) + "\n"


def test_grouped_queries_have_no_hidden_tier() -> None:
    forms = [form.name for form in kernel_costs.forms_of(kernel_costs.MODELS["Llama-3-8B"])]
    assert forms == ["kv", "kv8"]
