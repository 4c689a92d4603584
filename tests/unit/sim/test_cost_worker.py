"""Workers by name: their memory, their tiers, and the estimate that they advertise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from aptserve.workload import Trace
from aptserve_scheduler.core import Objectives, Tier
from aptserve_scheduler.core.cost import CostModel, features
from aptserve_scheduler.sim import SimConfig, simulate
from aptserve_scheduler.sim.cost import (
    GPUS,
    MODELS,
    HiddenAttention,
    fit_estimate,
    gpu_names,
    make_worker,
    model_names,
)
from aptserve_scheduler.sim.cost.worker import scratch_bytes

BOTH = (Tier.KV, Tier.HIDDEN)


def test_the_pool_is_all_the_memory_that_is_left() -> None:
    spec = make_worker("opt-13b", "a100-40g", memory_utilization=0.9).spec
    model, gpu = MODELS["opt-13b"], GPUS["a100-40g"]
    scratch = scratch_bytes(model, BOTH, HiddenAttention.ABSORBED, 1, 256, 4096)
    unit_bytes = 16 * model.hidden_bytes_per_token
    left = 0.9 * gpu.memory_bytes - model.weight_bytes - scratch
    assert spec.num_units * unit_bytes <= left < (spec.num_units + 1) * unit_bytes
    assert 12_000 < spec.num_units // 2 * 16 < 16_000  # tokens, as keys and values


def test_tiers_have_units_by_their_size() -> None:
    spec = make_worker("llama-2-7b", "h100", block_size=32, worker_id="w7").spec
    assert [(tier.tier, tier.units_per_block) for tier in spec.tiers] == [
        (Tier.KV, 2),
        (Tier.HIDDEN, 1),
    ]
    assert (spec.block_size, spec.worker_id) == (32, "w7")
    (only,) = make_worker("qwen2.5-14b", "h100", tiers=("kv",)).spec.tiers
    assert only.units_per_block == 2


def test_limits_and_memory_reach_the_worker() -> None:
    small = make_worker("opt-125m", "l4", max_num_seqs=8, max_num_batched_tokens=512)
    assert (small.spec.max_num_seqs, small.spec.max_num_batched_tokens) == (8, 512)
    large = make_worker("opt-125m", "l4", memory_utilization=0.5)
    assert large.spec.num_units < small.spec.num_units


@pytest.mark.parametrize("model", model_names())
def test_every_model_runs_on_its_usual_gpus(model: str) -> None:
    spec = make_worker(model, "a100-40g", tiers=("kv",)).spec
    assert spec.num_units * spec.block_size // 2 > 2048


@pytest.mark.parametrize("gpu", gpu_names())
def test_every_gpu_runs_a_small_model(gpu: str) -> None:
    assert make_worker("opt-125m", gpu).spec.num_units > 0


@pytest.mark.parametrize(
    ("model", "gpu", "changes", "message"),
    [
        ("gpt-5", "h100", {}, "unknown model 'gpt-5'; known: opt-125m"),
        ("opt-13b", "tpu", {}, "unknown GPU 'tpu'; known: a100-40g"),
        ("opt-13b", "h100", {"tiers": ("kv", "disk")}, "unknown tier 'disk'; known: kv, hidden"),
        ("opt-13b", "h100", {"tiers": ("hidden",)}, "tiers must start with kv"),
        ("opt-13b", "h100", {"hidden_attention": "magic"}, "unknown hidden attention 'magic'"),
        ("opt-13b", "h100", {"memory_utilization": 1.1}, "memory_utilization must be in"),
        ("opt-13b", "h100", {"tensor_parallel": 3}, "tensor_parallel 3 on h100 is not known"),
        ("opt-66b", "h100", {"tiers": ("kv",), "tensor_parallel": 1}, "leaves no memory"),
        ("llama-3-8b", "h100", {}, "take 2 times the memory of keys and values"),
        ("opt-30b", "a100-40g", {}, "every one of its GPUs would hold all of them"),
        ("llama-2-7b", "h100", {"hidden_attention": "absorbed"}, "must be projected or reproj"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    model: str, gpu: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_worker(model, gpu, **changes)


@pytest.mark.parametrize("form", ["absorbed", "reprojected"])
def test_the_advertised_estimate_follows_the_true_cost(form: str) -> None:
    worker = make_worker("opt-13b", "a100-40g", hidden_attention=form)
    spec = worker.spec
    found = fit_estimate(
        worker.cost, BOTH, max_num_seqs=256, max_num_batched_tokens=4096, max_cached_tokens=14_000
    )
    assert found.median_error < 0.06
    assert found.p90_error < 0.15
    per_cached = spec.cost.seconds_per_cached_token
    assert per_cached[Tier.HIDDEN] > per_cached[Tier.KV] > 0
    batch = np.array([300, 500, 0]), np.array([1, 1, 800]), np.array([1, 2, 1], np.int8)
    estimate = CostModel(spec.cost, BOTH).seconds(features(*batch, BOTH))
    assert estimate == pytest.approx(worker.cost.seconds(*batch), rel=0.25)


@pytest.mark.parametrize("policy", ["fcfs", "apt"])
def test_a_simulation_runs_on_such_a_worker(policy: str) -> None:
    num = 12
    trace = Trace(
        name="made",
        arrival_seconds=np.array([0.2 * i for i in range(num)], np.float64),
        num_prompt_tokens=np.full(num, 300),
        num_output_tokens=np.full(num, 20),
        tenants=("",) * num,
        priorities=np.zeros(num, np.int64),
        note="",
    )
    worker = make_worker("opt-13b", "a100-40g")
    result = simulate(trace, SimConfig(policy, (worker,), Objectives(1.0, 1.0)))
    assert all(record.is_good for record in result.records)
    assert 2.5 < result.duration_seconds < 5.0
