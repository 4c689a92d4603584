"""Children: kept running, given up, stopped in time; with modules of a few lines as children."""

import asyncio
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from aptserve.cli.supervisor import keeper as keeper_module
from aptserve.cli.supervisor.backoff import HEALTHY_SECONDS, MAX_FAST_FAILURES, Backoff
from aptserve.cli.supervisor.child import Child, ChildSpec, describe_exit
from aptserve.cli.supervisor.keeper import ChildGaveUpError, Keeper
from aptserve.cli.supervisor.parts import Part, State
from support.eventually import eventually

MakeChild = Callable[..., Child]

READY = "print('ready', flush=True)\n"
SLEEP = "import signal\nsignal.pause()\n"


@pytest.fixture
def make_child(tmp_path: Path) -> MakeChild:
    def make(source: str, name: str = "part", *, with_log: bool = True) -> Child:
        (tmp_path / f"{name}_module.py").write_text(source)
        environment = {"PYTHONPATH": str(tmp_path)}
        log_path = tmp_path / f"{name}.log" if with_log else None
        return Child(ChildSpec(name, f"{name}_module", environment, log_path))

    return make


def make_keeper(child: Child, monkeypatch: pytest.MonkeyPatch, *, ready: bool) -> Keeper:
    """A keeper without pauses, whose part counts as ready from its start on if ``ready``."""

    def on_change(part: Part) -> None:
        if ready and part.state is State.STARTING:
            part.become(State.READY)

    class Hasty(Backoff):
        def next_delay_seconds(self, ready_seconds: float | None) -> float | None:
            return None if super().next_delay_seconds(ready_seconds) is None else 0.0

    monkeypatch.setattr(keeper_module, "Backoff", Hasty)
    return Keeper(child, Part(child.spec.name, on_change))


def test_delays_double_and_end() -> None:
    backoff = Backoff()
    delays = [backoff.next_delay_seconds(None) for _ in range(MAX_FAST_FAILURES)]
    assert delays == [0.5, 1.0, 2.0, 4.0, None]


def test_a_healthy_while_clears_the_record() -> None:
    backoff = Backoff()
    for _ in range(3 * MAX_FAST_FAILURES):
        assert backoff.next_delay_seconds(HEALTHY_SECONDS) == 0.5


async def test_a_child_that_ends_itself_before_it_was_ready_is_given_up(
    make_child: MakeChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = make_child("print('no such model'); raise SystemExit(1)")
    with pytest.raises(ChildGaveUpError, match=r"part cannot start \(exit code 1\)\n  no such mod"):
        await make_keeper(child, monkeypatch, ready=False).run()


@pytest.mark.parametrize("code", [2, 3])
async def test_a_permanent_exit_is_given_up_with_its_last_line(
    make_child: MakeChild, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    record = json.dumps({"event": "cannot serve", "level": "error", "model": "x"})
    child = make_child(f"print('noise'); print({record!r}); raise SystemExit({code})")
    with pytest.raises(ChildGaveUpError) as caught:
        await make_keeper(child, monkeypatch, ready=True).run()
    assert str(caught.value) == (
        f"part cannot start (exit code {code}): error: cannot serve model=x"
    )


async def test_a_child_that_dies_is_started_again_until_it_is_pointless(
    make_child: MakeChild, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    child = make_child("import os; print('again', flush=True); os.kill(os.getpid(), 9)")
    with pytest.raises(ChildGaveUpError, match=r"died 5 times in a row, last by signal SIGKILL"):
        await make_keeper(child, monkeypatch, ready=False).run()
    assert (tmp_path / "part.log").read_text().split() == ["again"] * MAX_FAST_FAILURES


async def test_a_stopped_child_had_the_chance_to_end_well(
    make_child: MakeChild, tmp_path: Path
) -> None:
    child = make_child(
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n" + READY + SLEEP
    )
    await child.start()
    await eventually(lambda: "ready" in child.last_lines(1))
    await child.stop(timeout_seconds=10)
    assert await child.wait() == 7
    assert child.pid is None


async def test_a_child_that_ignores_sigterm_is_killed(make_child: MakeChild) -> None:
    child = make_child(
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY + SLEEP
    )
    await child.start()
    await eventually(lambda: "ready" in child.last_lines(1))
    await child.stop(timeout_seconds=0.05)
    assert await child.wait() == -9


async def test_a_child_is_in_a_session_of_its_own(make_child: MakeChild) -> None:
    child = make_child(SLEEP)
    await child.start()
    assert child.pid is not None
    assert os.getsid(child.pid) == child.pid
    child.kill()
    assert await child.wait() == -9
    await child.stop(timeout_seconds=0)  # an ended child needs no stop


async def test_a_child_ends_with_its_lifeline(make_child: MakeChild) -> None:
    child = make_child(READY + SLEEP)
    await child.start()
    await eventually(lambda: "ready" in child.last_lines(1))
    assert child._process is not None
    assert child._process.stdin is not None
    child._process.stdin.close()
    async with asyncio.timeout(10):
        assert await child.wait() == -15


async def test_children_of_a_child_do_not_hold_its_lifeline(make_child: MakeChild) -> None:
    child = make_child("import os, sys; print(os.readlink('/proc/self/fd/0'), flush=True)")
    await child.start()
    await child.wait()
    assert child.last_lines(1) == [os.devnull]


def test_exits_have_names() -> None:
    assert describe_exit(3) == "exit code 3"
    assert describe_exit(-9) == "signal SIGKILL"
    assert describe_exit(-35) == "signal 35"


def test_only_the_end_of_a_long_log_is_read(make_child: MakeChild, tmp_path: Path) -> None:
    (tmp_path / "part.log").write_text("x" * 10_000_000 + "\nlast\n\n")
    began = time.monotonic()
    assert make_child("").last_lines(1) == ["last"]
    assert time.monotonic() - began < 1
