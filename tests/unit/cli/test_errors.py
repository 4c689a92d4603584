"""Wrong use is one line and exit code 2; a failure is one line and exit code 1."""

import sys

import pytest
from support.commands import Cli


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["up", "--polcy", "apt"], "aptserve up: No such option: --polcy"),
        (
            ["up", "--policy", "best"],
            "aptserve: --policy 'best': must be one of apt, apt-slo, ",
        ),
        (["up", "--workers", "0"], "aptserve up: Invalid value for '--workers'"),
        (["up", "--listen", "here"], "aptserve: --listen 'here': must be HOST:PORT"),
        (["up", "--ttft", "soon"], "aptserve up: Invalid value for '--ttft': 'soon' is no"),
        (["up", "--ttft", "0s"], "aptserve: --ttft 0.0: "),
        (["up", "--pool-memory", "much", "--listen", "127.0.0.1:0"], "aptserve: --pool-memory 'mu"),
        (["scheduler", "--pipeline-depth", "0"], "aptserve: --pipeline-depth 0: "),
        (["scheduler", "--pipeline-depth", "x"], "aptserve scheduler: Invalid value for"),
        (["worker", "--tiers", "kv,gold"], "aptserve: --tiers 'kv,gold': each must be one of kv"),
        (["worker", "--threads", "0"], "aptserve: --threads 0: "),
        (["worker", "--pool-units", "8", "--pool-memory", "1GiB"], "aptserve: --pool-memory "),
        (["generate"], "aptserve generate: Missing argument 'PROMPT'"),
        (["generate", "x", "--temperature", "-1"], "aptserve: --temperature: must be in [0, 100]"),
        (["generate", "x", "--temperature", "nan"], "aptserve: --temperature: must be in [0, 100]"),
        (["generate", "x", "--stop", ""], "aptserve: --stop: each must have 1 to 256 bytes"),
        (["generate", ""], "aptserve: PROMPT: "),
        (["status", "--json", "--watch"], "aptserve: --json and --watch exclude each other"),
        (["stauts"], "aptserve: No such command 'stauts'"),
    ],
)
def test_wrong_use(cli: Cli, arguments: list[str], line: str) -> None:
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert outcome.error_line.startswith(line)
    assert outcome.out == ""


@pytest.mark.parametrize("command", [["status"], ["generate", "x"]])
def test_nobody_there(cli: Cli, command: list[str]) -> None:
    outcome = cli(*command, "--address", "127.0.0.1:1")
    assert outcome.code == 1
    assert outcome.error_line == (
        "aptserve: no service answers at 127.0.0.1:1; start one with: aptserve up"
    )


def test_health_of_nobody(cli: Cli) -> None:
    outcome = cli("health", "--address", "127.0.0.1:1")
    assert outcome.code == 1
    assert outcome.error_line == "aptserve: 127.0.0.1:1: no answer (UNAVAILABLE)"


def test_secrets_stay_out_of_messages(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APTSERVE_SCHEDULER_JOIN_TOKEN", "")
    assert cli("scheduler").error_line == "aptserve: the join token: must not be empty"


def test_without_the_extra_it_says_what_to_install(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aptserve.cli.find_spec", lambda name: None if name == "rich" else name)
    outcome = cli("up")
    assert outcome.code == 2
    assert outcome.error_line == (
        "aptserve: the command line needs rich: pip install 'apt-serve[cli]'"
    )


@pytest.mark.parametrize(("command", "package"), [("scheduler", "scheduler"), ("worker", "worker")])
def test_without_a_service_it_says_what_to_install(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, command: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, f"aptserve_{package}.config", None)
    outcome = cli(command)
    assert outcome.code == 2
    assert outcome.error_line.endswith(f"is not installed: pip install 'apt-serve[{package}]'")
