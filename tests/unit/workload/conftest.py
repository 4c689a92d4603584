"""Files for the readers: small ones written by a test, and public traces where they are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(name, text)`` makes a file and returns its path."""

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


@pytest.fixture(scope="session")
def public_traces() -> Path:
    """The folder of public traces that APTSERVE_TRACES names."""
    folder = os.environ.get("APTSERVE_TRACES")
    if not folder:
        pytest.skip("APTSERVE_TRACES names no folder with public traces")
    return Path(folder)
