"""``aptserve up`` with the fake engine."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.commands import StartUp, Up, assert_gone, start_command


@pytest.fixture
async def start_up(tmp_path: Path) -> AsyncIterator[StartUp]:
    started: list[Up] = []

    async def start(*arguments: str, serving: bool = True) -> Up:
        fixed = ("--model", "fake", "--listen", "127.0.0.1:0", "--log-dir", str(tmp_path))
        up = Up(await start_command("up", *fixed, *arguments))
        started.append(up)
        if serving:
            await up.wait_serving()
        return up

    yield start
    for up in started:
        if up.process.returncode is None:
            children = up.children()
            up.process.kill()
            await up.process.wait()
            await assert_gone(children)
