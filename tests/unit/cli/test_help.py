"""Help teaches, and tells the truth about defaults."""

import re
import subprocess
import sys

import pytest
import typer
from aptserve.cli.app import app
from aptserve_scheduler.config import SchedulerSettings
from aptserve_worker.config import WorkerSettings
from support.commands import Cli

COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_all_commands_are_there() -> None:
    assert (
        "abort bench demo drain generate health scheduler simulate status up watch worker".split()  # noqa: SIM905
        == COMMANDS
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_examples(cli: Cli, command: str) -> None:
    outcome = cli(command, "--help")
    assert outcome.code == 0
    assert f"Usage: aptserve {command}" in outcome.out
    assert re.search(rf"Examples\s+(\w+=\S+ )?aptserve {command}", outcome.out)
    assert outcome.err == ""


def test_no_command_shows_the_help(cli: Cli) -> None:
    outcome = cli()
    assert outcome.code == 0
    assert all(command in outcome.out for command in COMMANDS)


def test_version(cli: Cli) -> None:
    assert re.fullmatch(r"aptserve \d+\.\d+\.\d+\n", cli("--version").out)


@pytest.mark.parametrize(
    ("command", "settings"), [("scheduler", SchedulerSettings), ("worker", WorkerSettings)]
)
def test_shown_defaults_are_the_services(command: str, settings: type) -> None:
    """Options show a default as text; where it is a plain value it must be the setting's."""
    options = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    spelled = {1.0: "1s"}
    num_compared = 0
    for option in options:
        default = settings.model_fields[option.name].default if option.name != "help" else None
        if default is None or not isinstance(default, str | int | float):
            continue
        assert option.show_default in (default, str(default), spelled.get(default)), option.name
        num_compared += 1
    assert num_compared >= 6


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys; from aptserve.cli import main; main(['up', '--help']);"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic_settings', 'aptserve_scheduler',"
        " 'aptserve_worker', 'asyncio'}; sys.exit(str(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stderr.strip() in ("set()", "{'asyncio'}")
