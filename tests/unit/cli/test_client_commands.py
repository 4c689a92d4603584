"""Commands against a scripted service over loopback."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from aptserve.errors import InvalidArgumentError, NotFoundError
from aptserve.v1 import admin_pb2, inference_pb2, types_pb2, worker_pb2
from support.commands import Cli
from support.fake_service import ANSWER, FakeService, chunk, fail, started


def make_status() -> admin_pb2.GetStatusResponse:
    tier = admin_pb2.TierStatus(
        tier=types_pb2.CACHE_TIER_HIDDEN, units_per_block=1, num_used_units=3, num_sequences=2
    )
    speed = worker_pb2.TierSeconds(tier=types_pb2.CACHE_TIER_HIDDEN, seconds_per_cached_token=0.125)
    worker = admin_pb2.WorkerStatus(
        worker_id="worker-0",
        device="cpu",
        num_units=12,
        num_used_units=3,
        tiers=[tier],
        max_num_seqs=8,
        max_num_batched_tokens=64,
        calibration=worker_pb2.Calibration(base_seconds=0.5, tiers=[speed]),
    )
    return admin_pb2.GetStatusResponse(
        version="1.2.3", policy="apt", accepting=True, model="tiny", workers=[worker], num_waiting=7
    )


def test_generate_prints_the_answer(cli: Cli, service: FakeService) -> None:
    outcome = cli("generate", "x", "--address", service.address)
    assert (outcome.code, outcome.out) == (0, f"{ANSWER}\n")


def test_generate_sends_what_the_flags_say(cli: Cli, service: FakeService) -> None:
    flags = "--max-tokens 3 --temperature 0.5 --top-k 4 --seed 5 --stop a --stop b --ignore-eos"
    times = "--ttft 250ms --tbt 2s --timeout 1m --api-key secret -m fake"
    hints = "--tenant team --priority -3 --expected-output-tokens 2"
    flags = f"{flags} {times} {hints}"
    cli("generate", "x", "-a", service.address, *flags.split())
    (request,) = service.requests
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k) == (3, 0.5, 4)
    assert (sampling.seed, list(sampling.stop_strings), sampling.ignore_eos) == (
        5,
        ["a", "b"],
        True,
    )
    assert request.objectives.ttft.ToMilliseconds() == 250
    assert request.objectives.tbt.ToSeconds() == 2
    assert request.model == "fake"
    assert (request.tenant, request.priority, request.expected_output_tokens) == ("team", -3, 2)
    assert service.metadata[0]["authorization"] == "Bearer secret"


def test_generate_as_json_is_one_object(cli: Cli, service: FakeService) -> None:
    answer = json.loads(cli("generate", "x", "--json", "-a", service.address).out)
    assert answer["text"] == ANSWER
    assert answer["token_ids"] == list(ANSWER.encode())
    assert answer["finish_reason"] == "length"
    assert answer["usage"] == {"num_prompt_tokens": 3, "num_output_tokens": len(ANSWER)}
    assert "total_seconds" in answer["timing"]


def test_generate_reads_standard_input(
    cli: Cli, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("naïve\n".encode())))
    assert cli("generate", "-", "-a", service.address).code == 0
    assert service.requests[0].text == "naïve\n"


def test_generate_refuses_input_that_is_no_text(
    cli: Cli, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    outcome = cli("generate", "-", "-a", service.address)
    assert (outcome.code, service.requests) == (2, [])
    assert outcome.error_line.startswith("aptserve: standard input is not UTF-8")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (NotFoundError("no model big"), 1, "aptserve: no model big"),
        (InvalidArgumentError("sampling.max_tokens", "too many"), 2, "aptserve: --max-tokens: too"),
        (InvalidArgumentError("priority", "no"), 2, "aptserve: --priority: no"),
        (InvalidArgumentError("tenant", "no"), 2, "aptserve: --tenant: no"),
        (
            InvalidArgumentError("expected_output_tokens", "no"),
            2,
            "aptserve: --expected-output-tokens: no",
        ),
    ],
)
def test_a_refusal_is_one_line(
    cli: Cli, service: FakeService, error: Any, code: int, line: str
) -> None:
    service.script(fail(error))
    outcome = cli("generate", "x", "-a", service.address)
    assert outcome.code == code
    assert outcome.error_line.startswith(line)


def endless(request: Any, context: Any) -> Iterator[inference_pb2.GenerateResponse]:
    yield started()
    while context.is_active():
        yield chunk("more ")


def spawn(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "aptserve.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_cancels_the_request(service: FakeService) -> None:
    service.script(endless)
    with spawn("generate", "x", "-a", service.address) as process:
        assert process.stdout is not None
        assert process.stdout.read(5) == "more "
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.communicate(timeout=10)[1]
    assert process.returncode == 130
    service.wait_ended()


def test_a_closed_pipe_ends_it_quietly(service: FakeService) -> None:
    service.script(endless)
    with spawn("generate", "x", "-a", service.address) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        os.read(process.stdout.fileno(), 5)
        process.stdout.close()
        assert process.wait(timeout=10) == 1
        assert process.stderr.read() == ""
    service.wait_ended()


def test_status_shows_workers_tiers_queue_and_policy(cli: Cli, service: FakeService) -> None:
    service.responses["GetStatus"] = make_status()
    out = cli("status", "-a", service.address).out
    for text in ("tiny", "apt", "7 waiting", "worker-0", "3 of 12 units used, 9 free"):
        assert text in out
    assert "hidden 3 units, 2 requests" in out


def test_status_without_workers_says_so(cli: Cli, service: FakeService) -> None:
    service.responses["GetStatus"] = admin_pb2.GetStatusResponse(policy="apt")
    out = cli("status", "-a", service.address).out
    assert "no worker is attached" in out
    assert "not accepting" in out


def test_status_as_json(cli: Cli, service: FakeService) -> None:
    service.responses["GetStatus"] = make_status()
    status = json.loads(cli("status", "--json", "-a", service.address).out)
    (worker,) = status["workers"]
    assert worker["tiers"][0]["tier"] == "hidden"
    assert (worker["max_num_seqs"], worker["max_num_batched_tokens"]) == (8, 64)
    assert worker["calibration"] == {
        "base_seconds": 0.5,
        "seconds_per_token": 0.0,
        "seconds_per_sequence": 0.0,
        "seconds_per_attention_pair": 0.0,
        "tiers": [{"tier": "hidden", "seconds_per_cached_token": 0.125}],
    }


def make_plan(plan_id: int) -> admin_pb2.WatchPlansResponse:
    planned = admin_pb2.PlannedRequest(
        request_id="r", tier=types_pb2.CACHE_TIER_KV, num_new_tokens=5
    )
    return admin_pb2.WatchPlansResponse(
        worker_id="worker-0", plan_id=plan_id, reason="[all] fit", planned=[planned], num_dropped=2
    )


def test_watch_shows_a_line_per_plan(cli: Cli, service: FakeService) -> None:
    service.plans = [make_plan(1), make_plan(2), make_plan(3)]
    outcome = cli("watch", "--count", "2", "-a", service.address)
    first, second = outcome.out.splitlines()
    assert "worker-0 #1  1 requests (1 kv), 5 tokens" in first
    assert "[all] fit" in first
    assert "2 plans missed" in first
    assert "#2" in second


def test_watch_as_json(cli: Cli, service: FakeService) -> None:
    service.plans = [make_plan(1)]
    (line,) = cli("watch", "--json", "-n", "1", "-a", service.address).out.splitlines()
    assert json.loads(line)["planned"][0]["tier"] == "kv"


@pytest.mark.parametrize(("num_left", "code"), [(0, 0), (2, 1)])
def test_drain(cli: Cli, service: FakeService, num_left: int, code: int) -> None:
    service.responses["Drain"] = admin_pb2.DrainResponse(num_unfinished=num_left)
    assert cli("drain", "--timeout", "2s", "-a", service.address).code == code
    assert service.requests[0].timeout.ToSeconds() == 2


def test_abort_names_what_was_not_running(cli: Cli, service: FakeService) -> None:
    service.responses["Abort"] = inference_pb2.AbortResponse(aborted_request_ids=["a"])
    outcome = cli("abort", "a", "b", "-a", service.address)
    assert (outcome.code, outcome.out) == (1, "aborted a\n")
    assert outcome.error_line == "aptserve: not running: b"


@pytest.mark.parametrize(("name", "code"), [("worker-0", 0), ("worker", 0), ("work", 1)])
def test_health_of_a_worker(cli: Cli, service: FakeService, name: str, code: int) -> None:
    service.responses["GetStatus"] = make_status()
    assert cli("health", "--worker", name, "-a", service.address).code == code
