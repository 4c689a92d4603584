"""The import rules: each refuses what it is there for and lets the rest pass."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "check_imports", ROOT / "tools" / "check_imports.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def check(tool: ModuleType, tmp_path: Path) -> Callable[[str, str], list[str]]:
    def check_one(path: str, source: str) -> list[str]:
        file = tmp_path / path
        file.parent.mkdir(parents=True)
        file.write_text(source)
        return list(tool.violations(tmp_path))

    return check_one


SDK = "client/aptserve/client.py"
CLI = "client/aptserve/cli/up.py"
SERVICE = "scheduler_svc/aptserve_scheduler/service.py"
CORE = "scheduler_svc/aptserve_scheduler/core/scheduler.py"
POLICY = "scheduler_svc/aptserve_scheduler/policies/apt.py"
WORKER = "gpu_worker/aptserve_worker/session.py"
KERNEL = "kernels/aptserve_kernels/attention.py"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (SDK, "import numpy"),
        (SDK, "import rich"),
        (SDK, "from aptserve import cli"),
        (SDK, "def f():\n    import torch"),
        (CLI, "import torch"),
        (CLI, "from aptserve_worker.main import run"),
        (CLI, "import aptserve_scheduler"),
        (SERVICE, "import torch.nn"),
        (SERVICE, "from aptserve_worker import plan"),
        (SERVICE, "if True:\n    from transformers import AutoTokenizer"),
        (CORE, "import grpc"),
        (CORE, "import asyncio"),
        (CORE, "from google.protobuf import message"),
        (CORE, "from time import monotonic"),
        (CORE, "from aptserve_scheduler.api import servicer"),
        (CORE, "from ..api import servicer"),
        (POLICY, "import threading"),
        (POLICY, "from ..service import run"),
        (WORKER, "import aptserve_scheduler.core.types"),
        (KERNEL, "import grpc"),
        (KERNEL, "from aptserve_worker.plan import Tier"),
    ],
)
def test_refuses(check: Callable[[str, str], list[str]], path: str, source: str) -> None:
    (line,) = check(path, source)
    assert line.startswith(f"{path}:")
    assert "belong" in line or "put service code" in line


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (SDK, "import json, grpc\nfrom google.protobuf import any_pb2\nfrom .v1 import types_pb2"),
        (CLI, "import typer\nfrom rich.console import Console\nfrom aptserve import Client"),
        (CLI, "def f():\n    from aptserve_worker.main import run"),
        (SERVICE, "import asyncio, grpc, structlog\nfrom .core import scheduler"),
        (CORE, "import heapq\nfrom . import types\nfrom aptserve_scheduler.policies import apt"),
        (POLICY, "import numpy as np\nfrom ..core.types import Tier"),
        (WORKER, "import torch, transformers, grpc\nfrom aptserve_kernels import dispatch"),
        (KERNEL, "import math, torch\nfrom triton import language"),
    ],
)
def test_permits(check: Callable[[str, str], list[str]], path: str, source: str) -> None:
    assert check(path, source) == []


def test_names_the_line_and_what_is_lazy_only(check: Callable[[str, str], list[str]]) -> None:
    (line,) = check(CLI, "import os\n\nimport aptserve_worker\n")
    assert line.startswith(f"{CLI}:3: imports aptserve_worker at module level - ")


def test_the_repository_keeps_the_rules(tool: ModuleType) -> None:
    assert list(tool.violations(ROOT)) == []
