"""``aptserve up`` from start to stop, and what it does when something dies."""

import json
import os
import signal
import socket
from pathlib import Path

import psutil
import pytest
from support.commands import StartUp, Up, assert_gone, run_command
from support.eventually import eventually


def worker_of(up: Up) -> psutil.Process:
    return next(child for child in up.children() if "aptserve_worker" in child.cmdline())


def scheduler_of(up: Up) -> psutil.Process:
    return next(child for child in up.children() if "aptserve_scheduler" in child.cmdline())


async def test_serves_until_ctrl_c(start_up: StartUp) -> None:
    up = await start_up("--workers", "2", "--first-prompt", "def f():", "--policy", "fcfs")
    shown = "".join(up.output)
    assert "def f():" in shown
    assert "tokens (length), first after" in shown
    assert f"aptserve status --watch --address {up.address}" in shown

    answer = await run_command("generate", "x", "-n", "5", "--json", "-a", up.address)
    assert json.loads(answer.out)["usage"]["num_output_tokens"] == 5
    status = json.loads((await run_command("status", "--json", "-a", up.address)).out)
    assert sorted(worker["worker_id"] for worker in status["workers"]) == ["worker-0", "worker-1"]
    assert status["policy"] == "fcfs"
    assert (await run_command("health", "-a", up.address)).code == 0

    children = up.children()
    assert len(children) == 3
    assert await up.signal_and_wait(signal.SIGINT) == 0
    await assert_gone(children)


async def test_a_dead_worker_comes_back(start_up: StartUp) -> None:
    up = await start_up()
    worker_of(up).kill()
    assert "signal SIGKILL" in await up.read_until(r"^worker-0: restarting")
    await up.read_until(r"^worker-0: ready")
    assert (await run_command("generate", "x", "-n", "5", "-a", up.address)).code == 0


async def test_a_dead_scheduler_comes_back(start_up: StartUp) -> None:
    up = await start_up()
    scheduler_of(up).kill()
    await up.read_until(r"^scheduler: restarting")
    await up.read_until(r"^scheduler: ready")

    async def serves() -> bool:
        return (await run_command("health", "-a", up.address)).code == 0

    await eventually(serves, timeout_seconds=20)


async def test_no_child_outlives_a_killed_supervisor(start_up: StartUp) -> None:
    up = await start_up()
    children = up.children()
    assert await up.signal_and_wait(signal.SIGKILL) == -9
    await assert_gone(children)


async def test_a_second_ctrl_c_does_not_wait(start_up: StartUp) -> None:
    up = await start_up("--grace", "1h")
    children = up.children()
    worker_of(up).suspend()  # so that it cannot stop in good order
    up.process.send_signal(signal.SIGINT)
    await up.read_until(r"^Stopping")
    assert await up.signal_and_wait(signal.SIGINT) == 130
    await assert_gone(children)


async def test_sigterm_stops_it_and_logs_are_json_in_files(
    start_up: StartUp, tmp_path: Path
) -> None:
    up = await start_up()
    children = up.children()
    assert await up.signal_and_wait(signal.SIGTERM) == 0
    await assert_gone(children)
    for name in ("scheduler", "worker-0"):
        lines = (tmp_path / f"{name}.log").read_text().splitlines()
        assert all("event" in json.loads(line) for line in lines)
        assert lines


async def test_verbose_logs_go_to_standard_error(start_up: StartUp, tmp_path: Path) -> None:
    up = await start_up("--verbose")
    assert await up.signal_and_wait() == 0
    assert up.process.stderr is not None
    assert "worker attached" in (await up.process.stderr.read()).decode()
    assert os.listdir(tmp_path) == []


async def test_a_stop_during_the_start(start_up: StartUp) -> None:
    up = await start_up(serving=False)
    await up.read_until(r"^scheduler: starting")
    await eventually(lambda: len(up.children()) == 2)
    children = up.children()
    assert await up.signal_and_wait() == 0
    await assert_gone(children)


async def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        outcome = await run_command("up", "--model", "fake", "--listen", address)
    assert outcome.code == 1
    assert outcome.error_line == (
        f"aptserve: cannot listen on {address}: Address already in use; "
        "choose another with --listen HOST:PORT"
    )


async def test_not_ready_in_time_names_what_is_missing(start_up: StartUp) -> None:
    up = await start_up("--start-timeout", "0.05s", serving=False)
    _, err = await up.process.communicate()
    assert up.process.returncode == 1
    assert "not ready after 0.05 s: scheduler, worker-0; logs are in" in err.decode()


async def test_a_service_with_a_key(start_up: StartUp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APTSERVE_SCHEDULER_API_KEY", "secret")
    up = await start_up("--first-prompt", "x")
    assert "tokens (length)" in "".join(up.output)
    assert (await run_command("status", "-a", up.address)).code == 1
    assert (await run_command("status", "-a", up.address, "--api-key", "secret")).code == 0
