"""``aptserve up --tensor-parallel``: a worker of several processes lives and dies as one."""

import signal
from pathlib import Path

import psutil
from aptserve import AsyncClient
from support.commands import Up, assert_gone, start_command
from support.models import greedy, make_model, save_model

PROMPT = [5, 9, 31, 7]


def ranks_of(up: Up) -> list[psutil.Process]:
    """The worker's children: every rank but the first."""
    return [child for child in up.children() if any("spawn_main" in s for s in child.cmdline())]


async def answer(up: Up) -> list[int]:
    async with AsyncClient(up.address) as client:
        completion = await client.complete(token_ids=PROMPT, max_tokens=6, timeout=60)
        return list(completion.token_ids)


async def test_serves_and_survives_the_loss_of_a_rank(tmp_path: Path) -> None:
    model = save_model(tmp_path, "llama")
    arguments = ("--listen", "127.0.0.1:0", "--log-dir", str(tmp_path), "--tensor-parallel", "2")
    pool = ("--block-size", "4", "--pool-units", "200")
    up = Up(await start_command("up", "--model", str(model), *arguments, *pool))
    try:
        await up.wait_serving()
        wanted = greedy(make_model("llama"), PROMPT, 6)
        assert await answer(up) == wanted

        (rank,) = ranks_of(up)
        rank.kill()
        assert "exit code 1" in await up.read_until(r"^worker-0: restarting")
        await up.read_until(r"^worker-0: ready")
        assert await answer(up) == wanted
        assert "rank 1 ended with exit code -9" in (tmp_path / "worker-0.log").read_text()

        children = up.children()
        assert len(ranks_of(up)) == 1
        assert await up.signal_and_wait(signal.SIGINT) == 0
        await assert_gone(children)
    finally:
        if up.process.returncode is None:
            children = up.children()
            up.process.kill()
            await up.process.wait()
            await assert_gone(children)
