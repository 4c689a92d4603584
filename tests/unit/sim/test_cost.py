"""Times of iterations against figures worked out by hand and against each other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from aptserve_scheduler.core import Tier
from aptserve_scheduler.sim.cost import GPUS, MODELS, HiddenAttention, StepModel

BOTH = (Tier.KV, Tier.HIDDEN)
RESULT = Path(__file__).parents[3] / "benchmarks" / "results" / "cost_model.json"


def make_cost(
    form: HiddenAttention = HiddenAttention.ABSORBED,
    *,
    model: str = "opt-13b",
    gpu: str = "a100-80g",
    host_seconds: float = 0.0,
    ranks: int = 1,
    tiers: tuple[Tier, ...] = BOTH,
) -> StepModel:
    return StepModel(
        MODELS[model],
        GPUS[gpu],
        tiers=tiers,
        hidden_attention=form,
        ranks=ranks,
        host_seconds=host_seconds,
    )


def seconds(cost: StepModel, cached: list[int], new: list[int], tiers: list[Tier]) -> float:
    return cost.seconds(
        np.array(cached, np.int64), np.array(new, np.int64), np.array(tiers, np.int8)
    )


def seconds_per_cached(cost: StepModel, tier: Tier, count: int = 16) -> float:
    """What a decode step over 32,000 tokens takes more than one over 16,000, per token."""
    times = [seconds(cost, [n] * count, [1] * count, [tier] * count) for n in (1000, 2000)]
    return (times[1] - times[0]) / (1000 * count)


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("opt-125m", 0.1252),
        ("opt-13b", 12.85),
        ("opt-30b", 29.97),
        ("opt-66b", 65.72),
        ("llama-2-7b", 6.738),
        ("llama-2-13b", 13.016),
        ("llama-3-8b", 8.030),
        ("qwen2.5-14b", 14.77),
    ],
)
def test_models_have_the_parameters_they_are_known_for(model: str, billions: float) -> None:
    assert MODELS[model].weight_bytes / 2e9 == pytest.approx(billions, rel=2e-3)


def test_a_token_takes_the_known_memory() -> None:
    assert MODELS["opt-13b"].kv_bytes_per_token == 800 * 1024
    assert MODELS["opt-13b"].hidden_bytes_per_token == 400 * 1024
    ratio = {
        name: model.hidden_bytes_per_token / model.kv_bytes_per_token
        for name, model in MODELS.items()
    }
    assert ratio["llama-2-7b"] == 0.5
    assert ratio["llama-3-8b"] == 2.0
    assert ratio["qwen2.5-14b"] == 2.5


@pytest.mark.parametrize(
    ("gpu", "projecting", "reading"), [("a100-80g", 17, 0.5), ("h100", 7, 0.24)]
)
def test_a_thousand_tokens_cost_what_kernel_timings_say(
    gpu: str, projecting: float, reading: float
) -> None:
    cost = make_cost(HiddenAttention.REPROJECTED, gpu=gpu)
    kv = 1e6 * seconds_per_cached(cost, Tier.KV)
    hidden = 1e6 * seconds_per_cached(cost, Tier.HIDDEN)
    assert kv == pytest.approx(reading, rel=0.2)
    # Projecting writes keys and values that attention then reads.
    assert hidden - kv == pytest.approx(projecting, rel=0.25)


@pytest.mark.parametrize("gpu", ["a100-40g", "a100-80g", "h100", "h200"])
def test_absorbed_attention_is_about_as_fast_as_over_keys_and_values(gpu: str) -> None:
    cost = make_cost(gpu=gpu)
    ratio = seconds_per_cached(cost, Tier.HIDDEN) / seconds_per_cached(cost, Tier.KV)
    assert 1.0 < ratio < 1.15


def test_each_form_of_hidden_attention_has_its_price() -> None:
    slope = {form: seconds_per_cached(make_cost(form), Tier.HIDDEN) for form in HiddenAttention}
    projected = slope[HiddenAttention.PROJECTED] / slope[HiddenAttention.REPROJECTED]
    assert slope[HiddenAttention.ABSORBED] < 0.1 * slope[HiddenAttention.PROJECTED]
    assert 0.45 < projected < 0.65


def test_less_bandwidth_is_slower_in_proportion() -> None:
    small, large = (seconds_per_cached(make_cost(gpu=f"a100-{m}"), Tier.KV) for m in ("40g", "80g"))
    assert small / large == pytest.approx(2.039 / 1.555)


@pytest.mark.parametrize("form", list(HiddenAttention))
@pytest.mark.parametrize("counts", [(7, 0), (0, 5), (12, 30)])
def test_a_series_of_decodes_takes_what_each_takes(
    form: HiddenAttention, counts: tuple[int, int]
) -> None:
    cost = make_cost(form, host_seconds=1e-3)
    rng = np.random.default_rng(1)
    cached = rng.integers(1, 900, sum(counts))
    tiers = np.repeat(np.array(BOTH, np.int8), counts)
    new = np.ones_like(cached)
    steps = [cached + step for step in range(20)]
    totals = [np.array([float(row[tiers == tier].sum()) for row in steps]) for tier in BOTH]
    expected = [cost.seconds(row, new, tiers) for row in steps]
    assert cost.decode_seconds(counts, totals).tolist() == expected
    assert cost.decode_seconds(counts, [series[3] for series in totals]) == expected[3]


def test_more_work_takes_longer() -> None:
    cost = make_cost()
    one, kv = [Tier.KV], Tier.KV
    growing = [
        seconds(cost, [0], [1], one),
        seconds(cost, [0], [500], one),
        seconds(cost, [1000], [500], one),
        seconds(cost, [1000], [500], [Tier.HIDDEN]),
        seconds(cost, [1000, 1000], [500, 1], [Tier.HIDDEN, kv]),
        seconds(cost, [1000, 1000, 1000], [500, 1, 500], [Tier.HIDDEN, kv, kv]),
    ]
    assert growing == sorted(set(growing))


def test_a_chunk_over_hidden_states_projects_them_once() -> None:
    cost = make_cost()
    model, gpu = MODELS["opt-13b"], GPUS["a100-80g"]
    extra = [
        seconds(cost, [1500], [n], [Tier.HIDDEN]) - seconds(cost, [1500], [n], [Tier.KV])
        for n in (2, 800)
    ]
    projection = gpu.gemm_seconds(1500, 2 * model.hidden_size, model.hidden_size)
    assert extra == pytest.approx([model.num_layers * projection] * 2)
    assert extra[0] > 1500 * 4 * model.hidden_size**2 * model.num_layers / gpu.flops


def test_the_host_takes_its_time_once() -> None:
    idle, busy = (
        seconds(make_cost(host_seconds=s), [10, 5], [1, 9], [Tier.KV] * 2) for s in (0, 0.002)
    )
    assert busy - idle == pytest.approx(0.002)


def test_ranks_share_the_work_but_not_for_nothing() -> None:
    alone, two, four = (
        seconds(make_cost(model="opt-66b", ranks=n, tiers=(Tier.KV,)), [0], [2000], [Tier.KV])
        for n in (1, 2, 4)
    )
    assert alone / 2 < two < alone
    assert two / 2 < four < two


def test_a_prefill_is_bound_by_arithmetic_and_a_decode_by_bandwidth() -> None:
    cost, model, gpu = make_cost(), MODELS["opt-13b"], GPUS["a100-80g"]
    prefill = seconds(cost, [0], [2048], [Tier.KV])
    assert 0.5 < (model.weight_bytes * 2048 / gpu.flops) / prefill < 0.85
    decode = seconds(cost, [16], [1], [Tier.KV])
    assert 0.6 < (model.weight_bytes / gpu.bandwidth) / decode < 0.85


def test_the_shares_in_use_are_those_that_were_fitted() -> None:
    result = json.loads(RESULT.read_text())
    for name, shares in result["shares"].items():
        for share, values in shares.items():
            if share != "links":
                assert getattr(GPUS[name].efficiency, share) == values["used"]
                assert values["used"] == pytest.approx(values["fitted"], rel=1e-3)
    layers = [row for row in result["errors"] if row["family"] == "layer without attention"]
    assert max(row["median_error"] for row in layers if not row["in_sample"]) < 0.1
