"""``aptserve bench`` and its load generator against a scripted service."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aptserve import NotFoundError, ResourceExhaustedError, UnavailableError
from aptserve.cli.bench import LiveRun, play_trace
from aptserve.cli.bench.play import random_prompts
from aptserve.cli.bench.stopwatch import Stopwatch
from aptserve.evaluation import RequestRecord
from aptserve.evaluation.files import load_evaluation
from aptserve.v1 import admin_pb2, inference_pb2, types_pb2, worker_pb2
from aptserve.workload import Trace
from aptserve_scheduler.sim.calibration import CalibrationError, load_worker
from support.commands import Cli
from support.fake_service import WAIT_SECONDS, FakeService, chunk, fail, finished, started

VOCAB_SIZE = 50


def make_trace(*requests: tuple[float, int, int], tenants: tuple[str, ...] = ()) -> Trace:
    """A trace of (arrival, prompt tokens, output tokens)."""
    arrivals, prompts, outputs = zip(*requests, strict=True)
    return Trace(
        name="made",
        arrival_seconds=np.array(arrivals, np.float64),
        num_prompt_tokens=np.array(prompts, np.int64),
        num_output_tokens=np.array(outputs, np.int64),
        tenants=tenants or ("",) * len(requests),
        priorities=np.arange(len(requests)),
    )


def exactly(request: Any, context: Any) -> Iterator[Any]:
    """Stream what was asked for: the first token, then all others at once."""
    num_tokens = request.sampling.max_tokens
    yield started(request.request_id)
    yield chunk("a")
    if num_tokens > 1:
        yield chunk("b" * (num_tokens - 1))
    yield finished(num_tokens, timing=inference_pb2.Timing(num_preemptions=2))


@pytest.fixture(autouse=True)
def model(service: FakeService) -> None:
    service.responses["GetModel"] = inference_pb2.GetModelResponse(
        model="fake", vocab_size=VOCAB_SIZE, context_length=64
    )


async def play(service: FakeService, trace: Trace, **changes: Any) -> LiveRun:
    arguments = {"ttft_seconds": 20.0, "tbt_seconds": 10.0, "timeout_seconds": 20.0, **changes}
    return await play_trace(trace, address=service.address, **arguments)


async def test_requests_are_sent_as_the_trace_says(service: FakeService) -> None:
    service.script(*[exactly] * 3)
    trace = make_trace((0.0, 5, 1), (0.01, 7, 3), (0.02, 9, 4), tenants=("a", "", "b"))
    run = await play(service, trace)
    sent = [r for r in service.requests if isinstance(r, inference_pb2.GenerateRequest)]
    sent.sort(key=lambda request: request.priority)
    assert [len(request.token_ids.ids) for request in sent] == [5, 7, 9]
    assert all(token < VOCAB_SIZE for request in sent for token in request.token_ids.ids)
    assert [request.sampling.max_tokens for request in sent] == [1, 3, 4]
    assert all(request.sampling.ignore_eos for request in sent)
    assert [(request.tenant, request.priority) for request in sent] == [("a", 0), ("", 1), ("b", 2)]
    assert {request.objectives.ttft.ToSeconds() for request in sent} == {20}
    assert {request.objectives.tbt.ToSeconds() for request in sent} == {10}
    assert [record.request_id for record in run.records] == [r.request_id for r in sent]


async def test_records_tell_what_came(service: FakeService) -> None:
    service.script(*[exactly] * 2)
    ended: list[RequestRecord] = []
    run = await play(service, make_trace((0.0, 5, 1), (0.01, 7, 3)), on_record=ended.append)
    single, three = run.records
    assert (single.num_prompt_tokens, single.num_output_tokens) == (5, 1)
    assert single.tbt_p99_seconds is None
    assert (three.num_output_tokens, three.arrival_seconds) == (3, 0.01)
    assert three.ttft_seconds is not None
    assert three.tbt_p99_seconds is not None
    assert 0 < three.ttft_seconds <= three.longest_wait_seconds <= three.total_seconds
    assert all(record.is_good and record.num_preemptions == 2 for record in run.records)
    assert set(ended) == set(run.records)
    assert run.duration_seconds >= 0.01
    assert all(delay >= 0 for delay in run.send_delay_seconds)


def test_prompts_are_equal_for_equal_seeds() -> None:
    trace = make_trace((0.0, 50, 1), (0.0, 60, 1))
    first, again, other = (random_prompts(trace, VOCAB_SIZE, seed) for seed in (1, 1, 2))
    assert [len(prompt) for prompt in first] == [50, 60]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def short(request: Any, context: Any) -> Iterator[Any]:
    yield started()
    yield chunk("a")
    yield finished(1)


def empty(request: Any, context: Any) -> Iterator[Any]:
    yield started()
    yield finished(0)


def never(request: Any, context: Any) -> Iterator[Any]:
    """Say nothing until the client has given up."""
    yield started()
    gone = threading.Event()
    if context.add_callback(gone.set):
        gone.wait(WAIT_SECONDS)


def broken(request: Any, context: Any) -> Iterator[Any]:
    yield started()
    yield chunk("a")
    yield from fail(UnavailableError("worker gone"))(request, context)


@pytest.mark.parametrize(
    ("behaviour", "num_tokens", "error"),
    [
        (fail(ResourceExhaustedError("queue full")), 0, "RESOURCE_EXHAUSTED: queue full"),
        (short, 1, "ended with 1 of 3 tokens"),
        (empty, 0, "ended with 0 of 3 tokens"),
        (never, 0, "DEADLINE_EXCEEDED: "),
        (broken, 1, "UNAVAILABLE: worker gone"),
    ],
)
async def test_what_is_not_answered_in_full_is_a_miss(
    service: FakeService, behaviour: Any, num_tokens: int, error: str
) -> None:
    service.script(behaviour)
    run = await play(service, make_trace((0.0, 5, 3)), timeout_seconds=0.3)
    (record,) = run.records
    assert (record.completed, record.is_good, record.num_output_tokens) == (
        False,
        False,
        num_tokens,
    )
    assert (record.error or "").startswith(error)
    assert (record.ttft_seconds is None) == (num_tokens == 0)
    if not num_tokens:
        assert record.longest_wait_seconds == record.total_seconds


async def test_nobody_waits_for_those_before(service: FakeService) -> None:
    second_came = threading.Event()

    def first(request: Any, context: Any) -> Iterator[Any]:
        assert second_came.wait(WAIT_SECONDS)
        yield from exactly(request, context)

    def second(request: Any, context: Any) -> Iterator[Any]:
        second_came.set()
        yield from exactly(request, context)

    service.script(first, second)
    run = await play(service, make_trace((0.0, 5, 1), (0.0, 5, 1)))
    assert all(record.is_good for record in run.records)


async def test_without_a_model_there_is_no_run(service: FakeService) -> None:
    service.responses["GetModel"] = NotFoundError("no model")
    with pytest.raises(NotFoundError):
        await play(service, make_trace((0.0, 1, 1)))


def test_tokens_of_one_chunk_have_no_time_between_them() -> None:
    watch = Stopwatch(due=10.0)
    watch.on_tokens(0, 10.5)
    watch.on_tokens(2, 11.0)
    watch.on_tokens(1, 14.0)
    watch.on_tokens(97, 14.5)
    assert (watch.ttft_seconds, watch.num_tokens) == (1.0, 100)
    # 99 gaps, of which 3.0 is the largest: rank 99 of 99.
    assert watch.tbt_p99_seconds == 3.0
    watch.on_tokens(1, 14.5)
    assert watch.tbt_p99_seconds == 0.5
    assert watch.longest_wait_seconds(20.0) == 3.0
    assert watch.total_seconds(20.0) == 10.0


def test_a_late_send_counts_as_waiting() -> None:
    watch = Stopwatch(due=1.0)
    assert watch.longest_wait_seconds(5.0) == 4.0
    watch.on_tokens(1, 6.0)
    assert (watch.ttft_seconds, watch.tbt_p99_seconds) == (5.0, None)
    assert watch.longest_wait_seconds(9.0) == 5.0


def make_status(**changes: Any) -> admin_pb2.GetStatusResponse:
    tier = admin_pb2.TierStatus(
        tier=types_pb2.CACHE_TIER_KV, units_per_block=2, num_used_units=3, exact=True
    )
    worker = admin_pb2.WorkerStatus(
        worker_id="worker-0",
        device="cpu",
        num_units=12,
        block_size=4,
        tiers=[tier],
        max_num_seqs=8,
        max_num_batched_tokens=64,
        calibration=worker_pb2.Calibration(base_seconds=0.25),
    )
    fields = {"policy": "apt", "accepting": True, "model": "fake", "workers": [worker], **changes}
    return admin_pb2.GetStatusResponse(**fields)


TRACE_ROWS = "arrival_s,input_tokens,output_tokens\n0.0,5,2\n0.02,70,1\n0.03,6,3\n"


@pytest.fixture
def trace_file(tmp_path: Path) -> str:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE_ROWS)
    return str(path)


def test_the_report_counts_all_that_were_offered(
    cli: Cli, service: FakeService, trace_file: str
) -> None:
    service.responses["GetStatus"] = make_status()
    service.script(exactly, fail(ResourceExhaustedError("queue full")), exactly)
    flags = ("--slo-ttft", "20s", "--slo-tbt", "10s", "-a", service.address)
    outcome = cli("bench", "--trace", trace_file, *flags)
    assert outcome.code == 0
    assert "66.7 %" in outcome.out
    assert "fake on cpu" in outcome.out
    assert "1 of 3 requests over 64 tokens: prompts cut" in outcome.out
    assert "1 of 3 requests failed, RESOURCE_EXHAUSTED: queue full" in outcome.err


def test_the_file_holds_report_requests_and_workers(
    cli: Cli, service: FakeService, trace_file: str, tmp_path: Path
) -> None:
    service.responses["GetStatus"] = make_status()
    service.script(*[exactly] * 3)
    path = tmp_path / "run.json"
    flags = ("--rate", "50", "--json", str(path), "--slo-ttft", "20s", "-a", service.address)
    assert cli("bench", "--trace", trace_file, *flags).code == 0
    (run,) = load_evaluation(path).runs
    assert (run.cell.policy, run.cell.cv, run.rate) == ("apt", None, 50.0)
    assert (run.num_offered, run.num_good, run.num_promotions) == (3, 3, 0)
    assert run.tier_shares == {"kv": 0.25}
    document = json.loads(path.read_text())
    assert [r["num_output_tokens"] for r in document["records"]] == [2, 1, 3]
    assert len(document["send_delay_seconds"]) == 3
    assert document["service"]["policy"] == "apt"
    worker = load_worker(path)
    assert (worker.spec.num_units, worker.spec.cost.base_seconds) == (12, 0.25)


def test_a_service_that_is_gone_after_the_run_costs_no_report(
    cli: Cli, service: FakeService, trace_file: str, tmp_path: Path
) -> None:
    def last(request: Any, context: Any) -> Iterator[Any]:
        service.responses["GetStatus"] = NotFoundError("gone")
        yield from exactly(request, context)

    service.responses["GetStatus"] = make_status()
    service.script(exactly, exactly, last)
    path = tmp_path / "run.json"
    outcome = cli("bench", "--trace", trace_file, "--json", str(path), "-a", service.address)
    assert outcome.code == 0
    assert outcome.error_line.startswith("the service did not answer after the run")
    (run,) = load_evaluation(path).runs
    assert (run.num_completed, run.num_promotions, run.num_steps) == (3, None, None)
    with pytest.raises(CalibrationError, match="workers"):
        load_worker(path)


def test_late_sends_are_told(
    cli: Cli, service: FakeService, trace_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aptserve.cli.bench.outcome._LATE_SECONDS", -1.0)
    service.responses["GetStatus"] = make_status()
    service.script(*[exactly] * 3)
    outcome = cli("bench", "--trace", trace_file, "-a", service.address)
    assert outcome.error_line.startswith("3 of 3 requests were sent over")


def test_the_figure_is_a_picture(
    cli: Cli, service: FakeService, trace_file: str, tmp_path: Path
) -> None:
    service.responses["GetStatus"] = make_status()
    service.script(*[exactly] * 3)
    path = tmp_path / "run.png"
    assert cli("bench", "--trace", trace_file, "--plot", str(path), "-a", service.address).code == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--trace nowhere.csv", "aptserve: --trace: 'nowhere.csv' is neither a file nor one of"),
        ("--trace sharegpt", "aptserve: --rate: is needed, sharegpt has no arrivals"),
        ("--trace sharegpt --rate 0", "aptserve: --rate: must be above 0"),
        ("--trace sharegpt --rate 1 -n 0", "aptserve: --num-requests: must be at least 1"),
        ("--trace sharegpt --rate 1 --cv -1", "aptserve: --cv: must be at least 0"),
        ("--trace sharegpt --rate 1 --slo-ttft 0s", "aptserve: --slo-ttft: must be more than 0"),
        ("--trace sharegpt --rate 1 --timeout 0s", "aptserve: --timeout: must be more than 0"),
        ("--trace sharegpt --rate 1 --json no/run.json", "aptserve: --json: there is no folder"),
        ("--trace sharegpt --rate 1 --plot no/run.png", "aptserve: --plot: there is no folder"),
    ],
)
def test_wrong_usage_is_one_line(cli: Cli, service: FakeService, flags: str, line: str) -> None:
    outcome = cli("bench", *flags.split(), "-a", service.address)
    assert outcome.code == 2
    assert outcome.error_line.startswith(line)
    assert not any(isinstance(r, inference_pb2.GenerateRequest) for r in service.requests)
