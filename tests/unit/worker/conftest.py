from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from aptserve_worker.engine import ModelEngine
from support.engines import make_engine
from support.models import make_model, save_model
from transformers import PreTrainedModel


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models are faster without threads, and do not disturb one another."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")
    return lambda name: save_model(folder, name)


@pytest.fixture(scope="session")
def engine(checkpoint: Callable[[str], Path]) -> Callable[[str], ModelEngine]:
    """One engine per architecture for all tests; each test must leave it empty."""
    engines: dict[str, ModelEngine] = {}

    def get(name: str) -> ModelEngine:
        if name not in engines:
            engines[name] = make_engine(checkpoint(name))
        assert engines[name].allocator.num_free == engines[name].allocator.num_units
        return engines[name]

    return get


@pytest.fixture(scope="session")
def oracle() -> Callable[[str], PreTrainedModel]:
    """The same model as transformers runs it."""
    models: dict[str, PreTrainedModel] = {}

    def get(name: str) -> PreTrainedModel:
        if name not in models:
            models[name] = make_model(name)
        return models[name]

    return get
