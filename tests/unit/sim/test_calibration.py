"""A simulated worker from the file of a run."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aptserve_scheduler.core import CostCoefficients, Tier, TierSpec
from aptserve_scheduler.sim.calibration import (
    CalibrationError,
    LinearCost,
    load_worker,
    load_workers,
)

COST = CostCoefficients(1e-3, 1e-5, 2e-5, 1e-9, {Tier.KV: 1e-7, Tier.HIDDEN: 3e-7})
WORKER: dict[str, Any] = {
    "worker_id": "worker-0",
    "device": "cpu",
    "num_units": 1200,
    "num_used_units": 3,
    "block_size": 16,
    "max_num_seqs": 40,
    "max_num_batched_tokens": 512,
    "tiers": [
        {"tier": "kv", "units_per_block": 2, "exact": True},
        {"tier": "hidden", "units_per_block": 1, "exact": False},
    ],
    "calibration": {
        "base_seconds": 1e-3,
        "seconds_per_token": 1e-5,
        "seconds_per_sequence": 2e-5,
        "seconds_per_attention_pair": 1e-9,
        "tiers": [
            {"tier": "kv", "seconds_per_cached_token": 1e-7},
            {"tier": "hidden", "seconds_per_cached_token": 3e-7},
        ],
    },
}


def write(path: Path, *workers: object) -> Path:
    path.write_text(json.dumps({"records": [], "workers": workers}))
    return path


def test_a_worker_is_read_as_it_was(tmp_path: Path) -> None:
    spec = load_worker(write(tmp_path / "run.json", WORKER)).spec
    assert (spec.worker_id, spec.num_units, spec.block_size) == ("worker-0", 1200, 16)
    assert (spec.max_num_seqs, spec.max_num_batched_tokens) == (40, 512)
    assert spec.tiers == (TierSpec(Tier.KV, 2), TierSpec(Tier.HIDDEN, 1, exact=False))
    assert spec.cost == COST


def test_several_workers(tmp_path: Path) -> None:
    path = write(tmp_path / "run.json", WORKER, {**WORKER, "worker_id": "worker-1"})
    assert [worker.spec.worker_id for worker in load_workers(path)] == ["worker-0", "worker-1"]
    with pytest.raises(CalibrationError, match="there are 2, one is wanted"):
        load_worker(path)


def test_an_iteration_takes_the_linear_form() -> None:
    cost = LinearCost(COST, (Tier.KV, Tier.HIDDEN))
    seconds = cost.seconds(
        np.array([100, 50, 8]), np.array([1, 1, 10]), np.array([1, 2, 1], np.int8)
    )
    expected = 1e-3 + 12 * 1e-5 + 3 * 2e-5 + 10 * (8 + 5) * 1e-9 + 100 * 1e-7 + 50 * 3e-7
    assert seconds == pytest.approx(expected, rel=1e-12)


def test_decodes_in_a_row_take_what_each_takes() -> None:
    cost = LinearCost(COST, (Tier.KV, Tier.HIDDEN))
    num_cached = np.array([30, 10, 7])
    tiers = np.array([1, 2, 1], np.int8)
    steps = np.arange(4.0)
    singles = [cost.seconds(num_cached + step, np.ones(3, np.int64), tiers) for step in range(4)]
    series = cost.decode_seconds([2, 1], [37 + 2 * steps, 10 + steps])
    assert series == pytest.approx(singles, rel=1e-12)
    assert cost.decode_seconds([2, 1], [37.0, 10.0]) == pytest.approx(singles[0], rel=1e-12)


def without(worker: dict[str, Any]) -> None:
    del worker["calibration"]


def no_units(worker: dict[str, Any]) -> None:
    worker["num_units"] = 0


def negative_time(worker: dict[str, Any]) -> None:
    worker["calibration"]["base_seconds"] = -1.0


def no_time(worker: dict[str, Any]) -> None:
    worker["calibration"]["tiers"][0]["seconds_per_cached_token"] = float("nan")


def unknown_tier(worker: dict[str, Any]) -> None:
    worker["tiers"][1]["tier"] = "disk"


def hidden_first(worker: dict[str, Any]) -> None:
    worker["tiers"].reverse()


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (without, "workers.0.calibration: Field required"),
        (no_units, "workers.0.num_units: Input should be greater than 0"),
        (negative_time, "workers.0.calibration.base_seconds: "),
        (no_time, "workers.0.calibration.tiers.0.seconds_per_cached_token: "),
        (unknown_tier, "workers.0.tiers.1.tier: Input should be 'kv' or 'hidden'"),
        (hidden_first, "workers.0.tiers: must start with kv"),
    ],
)
def test_what_is_wrong_is_one_line(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], place: str
) -> None:
    worker = deepcopy(WORKER)
    change(worker)
    path = write(tmp_path / "run.json", worker)
    with pytest.raises(CalibrationError) as caught:
        load_worker(path)
    assert str(caught.value).startswith(f"{path}: {place}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "JSON"), ("[]", "object"), ("{}", "workers: Field"), ('{"workers": []}', "workers: ")],
)
def test_a_file_of_another_kind(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(CalibrationError, match=reason):
        load_workers(path)
