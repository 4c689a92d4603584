"""Launching a step asks nothing of the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from aptserve_worker.engine import ModelEngine
from aptserve_worker.plan import BatchPlan
from support.ahead import RandomPlanner
from support.engines import make_engine
from support.models import save_model
from support.pretend_device import PretendDevice, WaitsForDeviceError

WIDE: dict[str, dict[str, int]] = {
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64},
    "llama": {"hidden_size": 64},
    "gemma2": {"hidden_size": 64, "head_dim": 16},
}


def make(tmp_path: Path, name: str, graphs: str, tiers: str) -> ModelEngine:
    return make_engine(
        save_model(tmp_path, name, num_hidden_layers=2, **WIDE[name]),
        kernels="triton",
        dtype="float16" if "kv8" in tiers else "float32",
        graphs=graphs,
        tiers=tiers,
        block_size=16,
        pool_units=200,
        max_num_seqs=4,
    )


@pytest.mark.parametrize(
    ("name", "graphs", "tiers"),
    [
        ("opt", "off", "kv,hidden"),
        ("opt", "eager", "kv,hidden"),
        ("llama", "off", "kv,hidden,kv8"),
        ("llama", "eager", "kv,hidden,kv8"),
        ("gemma2", "off", "kv"),
    ],
)
def test_launching_never_waits(
    name: str, graphs: str, tiers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(tmp_path, name, graphs, tiers)
    device = PretendDevice.of(engine)
    planner = RandomPlanner(1, [t.tier for t in engine.info.tiers], max_num_seqs=4)
    for _ in range(14):
        plan = planner.next_work()
        if not isinstance(plan, BatchPlan):
            engine.release(plan)
            continue
        with device.watch(monkeypatch):
            engine.launch(plan)
        planner.apply(plan, engine.collect())


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.tolist(),
        lambda t: t[0].item(),
        lambda t: bool((t > 0).any()),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: t + torch.ones(3),
        lambda t: torch.ones(3).to(torch.device("cpu")),
        lambda t: torch.tensor([1.0], device=torch.device("cpu")),
        lambda t: t.cpu(),
        lambda t: t[torch.tensor([0, 1])],
    ],
)
def test_waiting_would_be_noticed(
    wait: Callable[[torch.Tensor], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = PretendDevice()
    tensor = device.put(torch.ones(3))
    with device.watch(monkeypatch), pytest.raises(WaitsForDeviceError):
        wait(tensor * 2)
    with device.watch(monkeypatch):
        assert device.has(torch.zeros(3, device=torch.device("cpu")) + tensor)
        assert not device.may_have(torch.zeros(3))
