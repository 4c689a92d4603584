"""What the demo shows, on a terminal and elsewhere."""

import dataclasses
import io

import pytest
from aptserve.cli.demo import words
from aptserve.cli.demo.panel import sparkline
from aptserve.cli.demo.screen import Screen
from aptserve.cli.demo.view import Phase, RunView
from aptserve.evaluation import RequestRecord
from aptserve.types import Calibration, Status, Tier, TierStatus, Totals, WorkerStatus
from rich.console import Console


def make_status(kv: int, hidden: int, waiting: int, oldest: float = 0.0) -> Status:
    worker = WorkerStatus(
        worker_id="worker-0",
        device="cpu",
        num_units=100,
        num_used_units=kv + hidden,
        block_size=16,
        unit_bytes=1024,
        tiers=(
            TierStatus(Tier.KV, 2, kv, 0, 0.0, True),
            TierStatus(Tier.HIDDEN, 1, hidden, 0, 0.0, True),
        ),
        num_plans_in_flight=0,
        num_steps=0,
        gap_share=0.0,
        resident_bytes=0,
        max_num_seqs=256,
        max_num_batched_tokens=4096,
        calibration=Calibration(1e-3, 1e-4, 0.0, 0.0, ()),
    )
    return Status(
        version="1",
        policy="fcfs",
        pipeline_depth=2,
        accepting=True,
        model="fake",
        workers=(worker,),
        num_waiting=waiting,
        num_running=7,
        oldest_wait_seconds=oldest,
        uptime_seconds=1.0,
        totals=Totals(0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        resident_bytes=0,
    )


def make_record(*, good: bool) -> RequestRecord:
    return RequestRecord(
        request_id="r",
        arrival_seconds=0.0,
        num_prompt_tokens=4,
        num_output_tokens=4,
        ttft_seconds=0.5 if good else 2.0,
        tbt_p99_seconds=0.1,
        total_seconds=3.0,
        longest_wait_seconds=2.0,
        completed=True,
        error=None,
        ttft_objective_seconds=1.0,
        tbt_objective_seconds=0.2,
        num_preemptions=0,
    )


def make_running(policy: str = "fcfs") -> RunView:
    view = RunView(policy)
    view.start(10)
    view.on_status(make_status(kv=60, hidden=20, waiting=5, oldest=2.5))
    view.on_record(make_record(good=True))
    view.on_record(make_record(good=False))
    return view


def render(screen: Screen, width: int) -> list[str]:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(screen.render())
    return captured.get().splitlines()


def make_screen(width: int, *views: RunView) -> Screen:
    first, second = views
    return Screen(Console(width=width, file=io.StringIO()), (first, second))


def test_a_run_under_way() -> None:
    text = "\n".join(render(make_screen(100, make_running(), RunView("apt")), 100))
    assert "fcfs · running" in text
    assert "7 run, 2 of 10 ended" in text
    assert "1 met, 1 missed" in text
    assert "5 wait, one for 2.5 s" in text
    assert "kv 60, hidden 20 of 100" in text
    assert "apt · comes next" in text


def test_a_run_that_is_over_stays_as_it_was() -> None:
    view = make_running()
    view.on_status(make_status(kv=20, hidden=0, waiting=1, oldest=1.0))
    view.end()
    view.on_status(make_status(kv=0, hidden=0, waiting=0))
    before = view.elapsed_seconds
    text = "\n".join(render(make_screen(100, view, RunView("apt")), 100))
    assert "fcfs · done" in text
    assert "5 at most, one for 2.5 s" in text
    assert "on average kv 40, hidden 10 of 100" in text
    assert view.elapsed_seconds == before


@pytest.mark.parametrize("width", [40, 79, 80, 100, 120, 200])
def test_every_line_fits(width: int) -> None:
    screen = make_screen(width, make_running(), RunView("apt", Phase.STARTING))
    screen.explain(words.about("fcfs"))
    screen.note(words.about_tiers(make_status(0, 0, 0).workers[0]))
    lines = render(screen, width)
    assert max(len(line) for line in lines) <= width
    tops = [line for line in lines if "╭" in line]
    assert len(tops) == (2 if width < 80 else 1)


def test_without_a_terminal_there_are_lines() -> None:
    out = io.StringIO()
    view = make_running()
    screen = Screen(Console(file=out, width=40), (view, RunView("apt")))
    with screen.shown():
        screen.explain(words.STARTING)
        screen.on_status(view)
        screen.on_status(view)  # too soon for another line
        screen.explain("")
    title, starting, progress = out.getvalue().splitlines()
    assert title == words.TITLE
    assert starting == words.STARTING
    assert progress.startswith("fcfs after ")
    assert "1 met and 1 missed of 10" in progress
    assert "60 kv and 20 hidden of 100 units" in progress


def test_on_a_terminal_there_are_no_such_lines() -> None:
    out = io.StringIO()
    view = make_running()
    console = Console(file=out, width=100, force_terminal=True)
    screen = Screen(console, (view, RunView("apt")))
    with screen.shown():
        screen.explain("Now something happens.")
        screen.on_status(view)
    assert "fcfs after" not in out.getvalue()
    assert "Now something happens." in out.getvalue()


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([], 4, ""),
        ([0, 4, 8], 10, " ▄█"),
        ([0, 0, 8, 0], 2, " █"),
        ([1], 3, "▁"),
    ],
)
def test_sparkline(values: list[int], width: int, expected: str) -> None:
    assert sparkline(values, 8, width) == expected


def test_every_policy_is_explained() -> None:
    from aptserve_scheduler.policies.registry import policy_names

    for name in policy_names():
        assert words.about(name).startswith(f"{name}: ")
        assert 20 < len(words.about(name)) < 300


def test_tiers_are_explained_as_offered() -> None:
    worker = make_status(0, 0, 0).workers[0]
    assert "50% as large" in words.about_tiers(worker)
    assert "hidden" not in words.about_tiers(dataclasses.replace(worker, tiers=worker.tiers[:1]))
