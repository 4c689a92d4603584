"""What ``aptserve up`` lays out before it starts anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from aptserve.cli.up import UpOptions, plan_deployment


def worker_environments(tmp_path: Path, num_workers: int, **flags: object) -> list[dict[str, str]]:
    options = UpOptions(
        scheduler_flags={"listen": "127.0.0.1:0"},
        worker_flags={"model": "fake", **flags},
        num_workers=num_workers,
        first_prompt=None,
        verbose=False,
        log_dir=tmp_path,
        start_timeout_seconds=1.0,
        grace_seconds=1.0,
    )
    return [dict(worker.environment) for worker in plan_deployment(options).workers]


def test_workers_are_told_apart(tmp_path: Path) -> None:
    first, second = worker_environments(tmp_path, 2)
    assert [first["APTSERVE_WORKER_WORKER_ID"], second["APTSERVE_WORKER_WORKER_ID"]] == [
        "worker-0",
        "worker-1",
    ]
    assert [first["APTSERVE_WORKER_REPLICA"], second["APTSERVE_WORKER_REPLICA"]] == ["0", "1"]


def test_a_single_worker_sees_the_whole_machine(tmp_path: Path) -> None:
    (only,) = worker_environments(tmp_path, 1)
    assert "APTSERVE_WORKER_REPLICA" not in only


def test_devices_may_be_named_one_by_one(tmp_path: Path) -> None:
    found = worker_environments(tmp_path, 3, device="cuda:1,cuda:3")
    devices = [environment["APTSERVE_WORKER_DEVICE"] for environment in found]
    assert devices == ["cuda:1", "cuda:3", "cuda:1"]


@pytest.mark.parametrize("num_workers", [1, 4])
def test_threads_are_shared_out(num_workers: int, tmp_path: Path) -> None:
    found = worker_environments(tmp_path, num_workers)
    told = [environment.get("APTSERVE_WORKER_NUM_THREADS") for environment in found]
    assert all(told) == (num_workers > 1)
