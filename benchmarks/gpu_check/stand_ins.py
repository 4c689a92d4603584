"""Runs the worker's engine and the scheduler's core where only torch and its friends are installed.

A machine that is lent for minutes has no package index. What engine and core need beside torch,
transformers and numpy are log lines, settings and a package whose top imports gRPC; none of it
matters to a measurement in one process.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from aptserve_worker.plan import Tier

_CLIENT = Path(__file__).parents[2] / "client" / "aptserve"


class _Silent:
    """Takes any log line, and keeps none."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self


def install() -> None:
    """Stand in for what is missing; what is there is used."""
    if _is_missing("structlog"):
        module: Any = ModuleType("structlog")
        module.get_logger = lambda *_: _Silent()
        module.configure = lambda **_: None
        module.make_filtering_bound_logger = lambda _: None
        sys.modules["structlog"] = module
    if _is_missing("aptserve") or _is_missing("grpc") or _is_missing("grpc_status"):
        # The package without its own imports, which are the client's: workloads need none of them.
        package: Any = ModuleType("aptserve")
        package.__path__ = [str(_CLIENT)]
        sys.modules.setdefault("aptserve", package)


def _is_missing(name: str) -> bool:
    return name not in sys.modules and find_spec(name) is None


def engine_settings(**changes: Any) -> Any:
    """What the engine reads of ``aptserve_worker.config.WorkerSettings``, with its defaults."""
    values: dict[str, Any] = {
        "tiers": (Tier.KV, Tier.HIDDEN),
        "kv8_format": "int8",
        "block_size": 16,
        "pool_units": None,
        "pool_memory": None,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 4096,
        "kernels": "auto",
        "graphs": "auto",
        "overlap": "auto",
        "gpu_memory_share": 0.9,
        "num_threads": None,
        "calibrate": True,
    }
    unknown = set(changes) - set(values)
    if unknown:
        raise ValueError(f"no such settings: {', '.join(sorted(unknown))}")
    return SimpleNamespace(**{**values, **changes})


def quiet() -> None:
    """No log lines between the rows of a table."""
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
