"""Start, health, drain, stop; who may call; what operators see."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import urllib.request
from typing import Any

import grpc
import psutil
import pytest
from aptserve.errors import UnauthenticatedError, UnavailableError, from_rpc_error
from aptserve.v1 import admin_pb2, inference_pb2, types_pb2
from aptserve.v1.types_pb2 import SamplingParams
from aptserve_scheduler.config import load_settings
from aptserve_scheduler.service import ADMIN, GATEWAY, INFERENCE, SchedulerService, StartError
from aptserve_worker.fake import FakeWorker
from aptserve_worker.session import RefusedError
from google.protobuf import descriptor_pool
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.eventually import eventually
from support.scheduling import (
    CALL_SECONDS,
    ScriptedWorker,
    Serving,
    read_event,
    read_to_end,
    serving,
)


async def test_health_follows_the_workers(served: Serving) -> None:
    for name in ("", INFERENCE):
        assert not await served.is_serving(name)
    async with FakeWorker(served.address):
        for name in ("", INFERENCE):
            await eventually(lambda name=name: served.is_serving(name))
    await eventually(lambda: is_not_serving(served))


async def is_not_serving(served: Serving) -> bool:
    return not await served.is_serving()


async def test_workers_are_welcome_before_there_is_one(served: Serving) -> None:
    assert await served.is_serving(GATEWAY)
    assert await served.is_serving(ADMIN)


async def test_a_watcher_of_health_sees_the_changes(served: Serving) -> None:
    watch = served.health.Watch(health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS)
    states = [(await watch.read()).status]
    async with FakeWorker(served.address):
        states.append((await watch.read()).status)
    states.append((await watch.read()).status)
    watch.cancel()
    response = health_pb2.HealthCheckResponse
    assert states == [response.NOT_SERVING, response.SERVING, response.NOT_SERVING]


async def test_no_progress_with_requests_pending_is_not_serving() -> None:
    async with (
        serving(stall_seconds=0.2) as served,
        FakeWorker(served.address) as worker,
    ):
        await eventually(served.is_serving)
        worker.gate.hold()
        call = served.generate(sampling=SamplingParams(max_tokens=2))
        await read_event(call, "started")
        await eventually(lambda: is_not_serving(served))
        worker.gate.open()
        await read_to_end(call)
        await eventually(served.is_serving)


async def test_requests_wait_for_a_worker_only_so_long() -> None:
    async with serving(worker_wait_seconds=0.1) as served:
        async with FakeWorker(served.address) as worker:
            worker.gate.hold()
            call = served.generate()
            await read_event(call, "started")
            await worker.kill()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_to_end(call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert served.service.driver.num_pending == 0


async def test_drain_refuses_the_new_and_waits_for_the_old(
    served: Serving, worker: FakeWorker
) -> None:
    worker.gate.hold()
    call = served.generate(sampling=SamplingParams(max_tokens=3))
    await read_event(call, "started")
    short = admin_pb2.DrainRequest(timeout=Duration(nanos=50_000_000))
    reply = await served.admin.Drain(short, timeout=CALL_SECONDS)
    assert reply.num_unfinished == 1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_to_end(served.generate())
    assert isinstance(from_rpc_error(caught.value), UnavailableError)
    await eventually(lambda: is_not_serving(served))
    drained = asyncio.ensure_future(served.admin.Drain(admin_pb2.DrainRequest(), timeout=10))
    worker.gate.open()
    assert (await drained).num_unfinished == 0
    events = await read_to_end(call)
    assert events[-1].finished.finish_reason == types_pb2.FINISH_REASON_LENGTH


async def test_stop_lets_requests_end_and_sends_workers_away(
    served: Serving, worker: FakeWorker
) -> None:
    worker.gate.hold()
    call = served.generate(sampling=SamplingParams(max_tokens=3))
    await read_event(call, "started")
    stopping = asyncio.create_task(served.service.stop(10.0))
    await eventually(lambda: not served.service.is_accepting())
    worker.gate.open()
    events = await read_to_end(call)
    assert events[-1].finished.finish_reason == types_pb2.FINISH_REASON_LENGTH
    await asyncio.wait_for(stopping, 10)
    await eventually(lambda: not worker.session.attached)


async def test_a_second_stop_does_not_wait_for_requests(
    served: Serving, worker: FakeWorker
) -> None:
    worker.gate.hold()
    call = served.generate()
    await read_event(call, "started")
    stopping = asyncio.create_task(served.service.stop(60.0))
    await eventually(lambda: not served.service.is_accepting())
    await asyncio.wait_for(served.service.stop(0.0), 10)
    await stopping
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_to_end(call)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_stopping_scheduler_tells_a_worker_to_dial_again(served: Serving) -> None:
    worker = await ScriptedWorker.attach(served)
    await worker.read("registered")
    stopping = asyncio.create_task(served.service.stop())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.call.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await stopping


async def test_an_address_in_use_is_one_clear_error(served: Serving) -> None:
    second = SchedulerService(load_settings(listen=served.address, policy="fcfs"))
    with pytest.raises(StartError, match=served.address):
        await second.start()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        third = SchedulerService(
            load_settings(listen="127.0.0.1:0", metrics_listen=listen, policy="fcfs")
        )
        with pytest.raises(StartError, match=listen):
            await third.start()


async def test_every_rpc_has_a_handler_that_reflection_shows(served: Serving) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    call = stub.ServerReflectionInfo(iter([request]), timeout=CALL_SECONDS)
    listed = {s.name for s in (await call.read()).list_services_response.service}
    call.cancel()
    assert {INFERENCE, GATEWAY, ADMIN, "grpc.health.v1.Health"} <= listed
    for service in (INFERENCE, GATEWAY, ADMIN):
        for method in descriptor_pool.Default().FindServiceByName(service).methods:
            # Bytes that are no message are refused by the handler, if there is one.
            kind = served.channel.unary_stream
            if method.client_streaming:
                call = served.channel.stream_stream(f"/{service}/{method.name}")(
                    iter([b"\xff"]), timeout=CALL_SECONDS
                )
            else:
                call = kind(f"/{service}/{method.name}")(b"\xff", timeout=CALL_SECONDS)
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT, method.full_name


SECRETS = {"api_key": "k" * 20, "join_token": "j" * 20}


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


@pytest.mark.parametrize(
    "metadata", [None, bearer("wrong"), bearer(SECRETS["join_token"]), bearer("ü" * 20)]
)
async def test_without_the_api_key_nothing_is_told(metadata: Any) -> None:
    if metadata and not metadata[0][1].isascii():
        metadata = (("authorization", "Bearer "),)
    async with serving(**SECRETS) as served:
        calls = [
            served.inference.GetModel(inference_pb2.GetModelRequest(), metadata=metadata),
            served.inference.Generate(inference_pb2.GenerateRequest(), metadata=metadata),
            served.admin.GetStatus(admin_pb2.GetStatusRequest(), metadata=metadata),
            served.admin.WatchPlans(admin_pb2.WatchPlansRequest(), metadata=metadata),
        ]
        for call in calls:
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
        assert not await served.is_serving()


async def test_the_right_secrets_open_the_doors() -> None:
    async with serving(**SECRETS) as served:
        with pytest.raises(RefusedError, match="UNAUTHENTICATED"):
            async with FakeWorker(served.address, join_token=SECRETS["api_key"]):
                pass
        async with FakeWorker(served.address, join_token=SECRETS["join_token"]):
            metadata = bearer(SECRETS["api_key"])
            reply = await served.inference.GetModel(
                inference_pb2.GetModelRequest(), metadata=metadata, timeout=CALL_SECONDS
            )
            assert reply.model == "fake"


async def test_the_error_names_the_reason() -> None:
    async with serving(**SECRETS) as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.admin.GetStatus(admin_pb2.GetStatusRequest())
        assert isinstance(from_rpc_error(caught.value), UnauthenticatedError)
        assert SECRETS["api_key"] not in str(caught.value)


async def test_status_shows_worker_queue_and_totals(served: Serving, worker: FakeWorker) -> None:
    await served.answer(sampling=SamplingParams(max_tokens=4))
    worker.gate.hold()
    call = served.generate(sampling=SamplingParams(max_tokens=4))
    await read_event(call, "started")
    status = await served.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=CALL_SECONDS)
    assert (status.policy, status.pipeline_depth, status.model) == ("fcfs", 2, "fake")
    assert status.accepting
    assert status.num_running == 1
    assert status.totals.num_accepted == 2
    assert status.totals.num_finished == 1
    assert status.totals.num_output_tokens >= 4
    assert status.resident_bytes > 0
    [shown] = status.workers
    assert (shown.worker_id, shown.device, shown.num_units) == ("w1", "fake", 4096)
    assert shown.num_used_units == 2
    assert [t.num_used_units for t in shown.tiers] == [2, 0]
    assert shown.num_plans_in_flight == 2
    assert shown.resident_bytes > 0
    worker.gate.open()
    await read_to_end(call)


async def test_plans_can_be_watched(served: Serving, worker: FakeWorker) -> None:
    watch = served.admin.WatchPlans(admin_pb2.WatchPlansRequest(), timeout=CALL_SECONDS)
    await watch.initial_metadata()
    await served.answer(request_id="r1", sampling=SamplingParams(max_tokens=3))
    first = await watch.read()
    assert (first.worker_id, first.plan_id, first.num_dropped) == ("w1", 1, 0)
    assert first.reason
    assert first.decision_time.ToNanoseconds() > 0
    [planned] = first.planned
    assert (planned.request_id, planned.num_computed_tokens, planned.num_new_tokens) == ("r1", 0, 3)
    second = await watch.read()
    assert second.planned[0].num_computed_tokens == 3
    watch.cancel()


async def test_metrics_are_served_under_known_names() -> None:
    async with (
        serving(metrics_listen="127.0.0.1:0") as served,
        FakeWorker(served.address, worker_id="w1") as worker,
    ):
        await served.answer(sampling=SamplingParams(max_tokens=4))
        worker.gate.hold()
        call = served.generate()
        await read_event(call, "started")
        url = f"http://{served.service.metrics_address}/metrics"
        text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read())
        worker.gate.open()
        call.cancel()
    lines = text.decode().splitlines()
    for line in (
        "aptserve:time_to_first_token_seconds_count 1.0",
        "aptserve:inter_token_latency_seconds_count 3.0",
        "aptserve:e2e_request_latency_seconds_count 1.0",
        "aptserve:request_queue_time_seconds_count 1.0",
        'aptserve:request_success_total{finished_reason="length"} 1.0',
        "aptserve:num_requests_running 1.0",
        "aptserve:num_requests_waiting 0.0",
        "aptserve:prompt_tokens_total 6.0",
        "aptserve:generation_tokens_total 4.0",
        "aptserve:num_preemptions_total 0.0",
        'aptserve:num_used_units{tier="kv",worker="w1"} 2.0',
        'aptserve:request_objectives_total{met="yes"} 1.0',
    ):
        assert line in lines
    assert any(line.startswith("aptserve:decision_time_seconds_bucket") for line in lines)
    assert any(line.startswith('aptserve:batch_sequences_total{tier="kv"') for line in lines)


async def start_process(**settings: str) -> asyncio.subprocess.Process:
    env = {f"APTSERVE_SCHEDULER_{name.upper()}": value for name, value in settings.items()}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "aptserve_scheduler",
        stderr=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, **env},
    )


async def test_the_process_ends_with_0_after_sigterm_and_is_small() -> None:
    process = await start_process(listen="127.0.0.1:0", policy="fcfs", log_format="json")
    assert process.stderr is not None
    try:
        async with asyncio.timeout(20):
            while b'"listening"' not in await process.stderr.readline():
                assert process.returncode is None
            assert psutil.Process(process.pid).memory_info().rss < 300 << 20
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


async def test_wrong_settings_end_the_process_with_2_and_one_line() -> None:
    process = await start_process(policy="best")
    async with asyncio.timeout(20):
        _, stderr = await process.communicate()
    assert process.returncode == 2
    assert stderr.decode().startswith("error: policy = 'best': must be one of ")
    assert stderr.count(b"\n") == 1
