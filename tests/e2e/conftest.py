from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.models import make_model, save_model
from transformers import PreTrainedModel


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")
    return lambda name: save_model(folder, name)


@pytest.fixture(scope="session")
def oracle() -> Callable[[str], PreTrainedModel]:
    models: dict[str, PreTrainedModel] = {}

    def get(name: str) -> PreTrainedModel:
        if name not in models:
            models[name] = make_model(name)
        return models[name]

    return get
