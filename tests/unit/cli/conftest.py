"""Runs commands in this process, against a scripted service."""

from collections.abc import Iterator

import pytest
from aptserve.cli import main
from support.commands import Cli, Outcome
from support.fake_service import FakeService, fake_service


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str) -> Outcome:
        capsys.readouterr()
        code = main(list(arguments))
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return run


@pytest.fixture
def service() -> Iterator[FakeService]:
    with fake_service() as service:
        yield service
