"""``aptserve demo`` with the fake engine: real processes, real streams, both runs."""

import json
import signal

import pytest
from support.commands import Up, assert_gone, run_command, start_command


@pytest.fixture(autouse=True)
def _fake_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APTSERVE_WORKER_MODEL", "fake")


async def test_both_runs_and_what_came_of_them() -> None:
    outcome = await run_command("demo", "--seconds", "5", "--policy", "chunked", "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    first, second = result["runs"]
    assert (first["policy"], second["policy"]) == ("fcfs", "chunked")
    for run in (first, second):
        assert run["num_requests"] == result["num_requests"] >= 20
        assert run["num_completed"] > 0
    assert result["model"] == "fake"
    assert "What came of it" in outcome.err
    assert "Now the very same requests" in outcome.err
    assert str(second["num_met"]) in result["sentence"]


@pytest.mark.parametrize("stage", ["^Starting", "^fcfs after", "^fcfs is done"])
async def test_ctrl_c_ends_everything(stage: str) -> None:
    demo = Up(await start_command("demo", "--policy", "chunked", "--seconds", "5"))
    await demo.read_until(stage)
    children = demo.children()
    if stage == "^fcfs after":
        assert len(children) == 2
    assert await demo.signal_and_wait(signal.SIGINT) == 130
    assert demo.process.stderr is not None
    # At first nothing has been started that would have to be stopped, and nothing is said.
    assert (await demo.process.stderr.read()).decode() in ("", "aptserve: interrupted\n")
    await assert_gone(children)
