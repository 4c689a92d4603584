"""How the ranks of a model meet."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist
from torch._C._distributed_c10d import FileStore

from aptserve_worker.config import WorkerSettings
from aptserve_worker.engine import choose_device
from aptserve_worker.model.probe import UnsupportedModelError
from aptserve_worker.parallel.group import RankGroup

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Longest wait of one rank for another; loading from a slow disk may keep them this far apart."""


def join_group(settings: WorkerSettings, rank: int, meeting_point: Path) -> RankGroup:
    """Meet the other ranks. Raises :class:`UnsupportedModelError` where there are too few GPUs."""
    size = settings.tensor_parallel
    device = choose_device(settings.device, rank)
    if device.type == "cuda" and torch.cuda.device_count() < size:
        raise UnsupportedModelError(
            f"--tensor-parallel {size} needs {size} GPUs, {torch.cuda.device_count()} are here."
        )
    if device.type == "cpu" and torch.accelerator.is_available():
        raise UnsupportedModelError(
            "--tensor-parallel with --device cpu needs the GPUs hidden: CUDA_VISIBLE_DEVICES=''."
        )
    if device.type == "cpu" and settings.num_threads is None:
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
    # All ranks are on this machine. transformers asks for the rank's number in the environment.
    os.environ["LOCAL_RANK"] = str(rank)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    is_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if is_gpu else "gloo",
        store=FileStore(str(meeting_point), size),
        rank=rank,
        world_size=size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if is_gpu else None,
    )
    return RankGroup(rank, size)


def leave_group() -> None:
    """Speak to the other ranks no more."""
    if dist.is_initialized():
        dist.destroy_process_group()
