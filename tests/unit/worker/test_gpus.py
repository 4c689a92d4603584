"""Workers of one machine share its GPUs out."""

from __future__ import annotations

import os

import pytest
import torch
from aptserve_worker import main
from aptserve_worker.config import WorkerSettings
from aptserve_worker.gpus import gpus_of, hide_gpus_of_others


@pytest.mark.parametrize(
    ("num_gpus", "num_own", "shares"),
    [
        (4, 1, ["0", "1", "2", "3", "0"]),
        (4, 2, ["01", "23", "01"]),
        (5, 2, ["01", "23", "01"]),
        (1, 1, ["0", "0"]),
        (1, 2, ["0", "0"]),
    ],
)
def test_each_takes_its_own_while_there_are_enough(
    num_gpus: int, num_own: int, shares: list[str]
) -> None:
    names = [str(i) for i in range(num_gpus)]
    found = ["".join(gpus_of(names, replica, num_own)) for replica in range(len(shares))]
    assert found == shares


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [(None, 2, "1"), ("5,3,4", 3, "3"), (" GPU-a, GPU-b", 2, "GPU-b"), ("7", 1, "7")],
)
def test_the_others_are_hidden(
    visible: str | None, count: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    hide_gpus_of_others(replica=1, num_own=1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_without_gpus_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    hide_gpus_of_others(replica=1, num_own=1)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize(
    ("replica", "device", "hides"),
    [(1, "auto", True), (0, "cuda", True), (None, "auto", False), (1, "cuda:1", False)],
)
def test_who_names_a_gpu_gets_it(
    replica: int | None, device: str, hides: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []

    def hide(replica: int, num_own: int) -> None:
        calls.append((replica, num_own))
        raise InterruptedError

    def build(_: WorkerSettings) -> None:
        raise InterruptedError

    monkeypatch.setattr(main, "hide_gpus_of_others", hide)
    monkeypatch.setattr("aptserve_worker.engine.build_engine", build)
    with pytest.raises(InterruptedError):
        main.build_engine(WorkerSettings(replica=replica, device=device))
    assert calls == ([(replica, 1)] if hides else [])
