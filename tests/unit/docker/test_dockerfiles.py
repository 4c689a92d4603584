"""The Dockerfiles as text: who they run as, what they copy, and that our reader reads them."""

import fnmatch
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from aptserve.cli.app import app
from aptserve_scheduler.config import SchedulerSettings
from typer.main import get_command

ROOT = Path(__file__).parents[3]
IMAGES = ["scheduler", "worker"]


@pytest.fixture(scope="module")
def reader() -> Any:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import dockerfile
    finally:
        sys.path.pop(0)
    return dockerfile


@pytest.fixture(params=IMAGES)
def stages(request: pytest.FixtureRequest, reader: Any) -> Any:
    return reader.parse((ROOT / "docker" / f"Dockerfile.{request.param}").read_text())


def test_runs_as_a_user_without_rights(stages: Any) -> None:
    user = stages[-1].last("USER").value
    created = "".join(step.value for step in stages[-1].instructions if step.name == "RUN")
    assert f"--create-home {user}" in created


def test_starts_a_command_that_exists(stages: Any) -> None:
    program, command = stages[-1].last("ENTRYPOINT").command
    assert program == "aptserve"
    assert command in get_command(app).commands  # type: ignore[attr-defined]


def test_has_a_health_check_by_the_command_line(stages: Any, reader: Any) -> None:
    command = reader.healthcheck_command(stages[-1].last("HEALTHCHECK"))
    assert "aptserve health" in " ".join(command)


def test_copies_only_what_the_ignore_file_lets_in(stages: Any) -> None:
    rules = (ROOT / ".dockerignore").read_text().split()
    let_in = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    copies = [step for step in stages[0].instructions if step.name == "COPY"]
    sources = {source for step in copies for source in step.value.split()[:-1]}
    assert sources <= let_in
    assert all((ROOT / source).exists() for source in sources)
    assert "*" in rules


def test_installs_pinned_packages_from_the_constraints(stages: Any) -> None:
    installs = [s.value for s in stages[0].instructions if "pip install" in s.value]
    assert installs
    assert all("-c constraints.txt" in install for install in installs)


def test_the_scheduler_image_has_no_worker_in_it(reader: Any) -> None:
    text = (ROOT / "docker" / "Dockerfile.scheduler").read_text()
    sources = [s.value for s in reader.parse(text)[0].instructions if s.name == "COPY"]
    assert not any(fnmatch.fnmatch(source, "*worker*") for source in sources)


def test_the_exposed_port_is_the_one_listened_on(reader: Any) -> None:
    stages = reader.parse((ROOT / "docker" / "Dockerfile.scheduler").read_text())
    listen = stages[-1].last("ENV").assignments["APTSERVE_SCHEDULER_LISTEN"]
    assert listen.endswith(f":{stages[-1].last('EXPOSE').value}")
    assert SchedulerSettings(listen=listen).listen == listen


def test_both_images_are_of_one_python(reader: Any) -> None:
    versions = {
        re.search(r"^ARG PYTHON_VERSION=(\S+)", text, re.MULTILINE)[1]  # type: ignore[index]
        for text in ((ROOT / "docker" / f"Dockerfile.{image}").read_text() for image in IMAGES)
    }
    assert len(versions) == 1


def test_the_reader_joins_lines_and_splits_flags(reader: Any) -> None:
    (stage,) = reader.parse(
        "ARG A=1\nFROM base:${A} AS build\n# a comment\nENV X=1 \\\n    Y='2 3'\n"
        'COPY --from=other /a /b\nHEALTHCHECK --interval=1s \\\n    CMD ["x", "y"]\nRUN a &&  b'
    )
    env, copy, health, run = stage.instructions
    assert (stage.name, stage.base) == ("build", "base:${A}")
    assert env.assignments == {"X": "1", "Y": "2 3"}
    assert (copy.flags, copy.value) == ({"from": "other"}, "/a /b")
    assert reader.healthcheck_command(health) == ["x", "y"]
    assert run.command == ["/bin/sh", "-c", "a &&  b"]


@pytest.mark.parametrize("text", ["RUN x", "FROM a\nONBUILD RUN x", "FROM a\nrum x"])
def test_the_reader_refuses_what_it_does_not_know(reader: Any, text: str) -> None:
    with pytest.raises(reader.DockerfileError, match="line"):
        reader.parse(text)
