"""The worker as a process of its own: signals and exit codes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator

import grpc
import pytest
from aptserve_worker.main import EXIT_BROKEN, EXIT_OK, EXIT_PERMANENT
from support.fake_gateway import FakeGateway, fake_gateway, make_plan, make_sequence

TIMEOUT_SECONDS = 20.0
WORKER = "import sys; from aptserve_worker import main; from aptserve_worker.config import *;"


class WorkerProcess:
    """A worker with the fake model, started through ``python -m`` unless ``code`` is given."""

    def __init__(self, address: str, *, code: str | None = None, **settings: str) -> None:
        self._arguments = ["-c", code] if code is not None else ["-m", "aptserve_worker"]
        settings = {"scheduler": address, "model": "fake", "log_format": "json", **settings}
        self._environment = {f"APTSERVE_WORKER_{k.upper()}": v for k, v in settings.items()}

    async def __aenter__(self) -> WorkerProcess:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            *self._arguments,
            env={**os.environ, **self._environment},
            stderr=asyncio.subprocess.PIPE,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    async def wait(self) -> tuple[int, str]:
        """Exit code and log."""
        _, log = await asyncio.wait_for(self.process.communicate(), TIMEOUT_SECONDS)
        assert self.process.returncode is not None
        return self.process.returncode, log.decode()


@pytest.fixture
async def gateway() -> AsyncIterator[FakeGateway]:
    async with fake_gateway() as gateway:
        yield gateway


async def test_sigterm_leaves_in_good_order(gateway: FakeGateway) -> None:
    async with WorkerProcess(gateway.address) as worker:
        stream = await gateway.accept()
        stream.plan(make_plan(1, new=[make_sequence()], scheduled=[(1, 0, 2)]))
        await stream.result()
        worker.process.send_signal(signal.SIGTERM)
        assert (await stream.receive()).WhichOneof("message") == "leaving"
        stream.detached()
        code, log = await worker.wait()
    assert code == EXIT_OK, log


async def test_second_signal_leaves_at_once(gateway: FakeGateway) -> None:
    async with WorkerProcess(gateway.address) as worker:
        stream = await gateway.accept()
        stream.plan(make_plan(1))
        await stream.result()
        worker.process.send_signal(signal.SIGINT)
        assert (await stream.receive()).WhichOneof("message") == "leaving"
        worker.process.send_signal(signal.SIGINT)
        code, log = await worker.wait()
    assert code == EXIT_OK, log


async def test_refusal_exits_3_with_one_line(gateway: FakeGateway) -> None:
    async with WorkerProcess(gateway.address, log_level="error") as worker:
        await gateway.refuse(grpc.StatusCode.UNAUTHENTICATED)
        code, log = await worker.wait()
    assert code == EXIT_PERMANENT
    assert log.count("\n") == 1
    assert "the scheduler refused this worker: UNAUTHENTICATED" in log


async def test_wrong_setting_exits_2_with_one_line() -> None:
    async with WorkerProcess("127.0.0.1:1", block_size="0") as worker:
        code, log = await worker.wait()
    assert code == 2
    assert log.startswith("error: block_size='0': ")
    assert log.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "num_lines"),
    [("ValueError", EXIT_PERMANENT, 1), ("OSError", EXIT_BROKEN, 1), ("KeyError", EXIT_BROKEN, 1)],
)
async def test_engine_that_cannot_be_built(error: str, code: int, num_lines: int) -> None:
    program = (
        f"{WORKER}\ndef fail(settings): raise {error}('no rotary here')\n"
        "main.build_engine = fail; sys.exit(main.main(load_settings()))"
    )
    async with WorkerProcess("127.0.0.1:1", code=program, log_level="error") as worker:
        actual, log = await worker.wait()
    assert actual == code
    assert "no rotary here" in log
    assert log.count("\n") == num_lines


async def test_signal_while_building_ends_at_once() -> None:
    program = (
        f"{WORKER}\nimport os, signal, threading\n"
        "def stuck(settings): os.kill(os.getpid(), signal.SIGTERM); threading.Event().wait(60)\n"
        "main.build_engine = stuck; main.CLOSE_TIMEOUT_SECONDS = 0.05\n"
        "sys.exit(main.main(load_settings()))"
    )
    async with WorkerProcess("127.0.0.1:1", code=program) as worker:
        code, log = await worker.wait()
    assert code == EXIT_OK, log
