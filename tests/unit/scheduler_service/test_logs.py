"""Log lines: one object each, the call's values on it, nobody's data in tracebacks."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog
from aptserve_scheduler.logs import configure_logging

PROMPT = "sec" + "ret prompt"


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    root.handlers[:], root.level = handlers, level


def fail_with(prompt: str) -> None:
    raise RuntimeError(f"{len(prompt)} characters")


def log_a_failure() -> None:
    log = structlog.stdlib.get_logger("test")
    structlog.contextvars.bind_contextvars(request_id="r1")
    try:
        fail_with(PROMPT)
    except RuntimeError:
        log.exception("failed", plan_id=3)


def test_json_lines_have_ids_and_a_traceback_without_locals(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging("info", "json")
    log_a_failure()
    written = capsys.readouterr().err
    line = json.loads(written)
    assert (line["event"], line["request_id"], line["plan_id"]) == ("failed", "r1", 3)
    assert line["exception"][0]["exc_type"] == "RuntimeError"
    assert "secret" not in written


def test_console_lines_have_no_locals_either(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "console")
    log_a_failure()
    written = capsys.readouterr().err
    assert "RuntimeError: 13 characters" in written
    assert "secret" not in written


def test_the_level_holds_for_libraries_too(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("error", "json")
    structlog.stdlib.get_logger("test").warning("ours")
    logging.getLogger("library").warning("theirs")
    logging.getLogger("library").error("serious")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["serious"]
