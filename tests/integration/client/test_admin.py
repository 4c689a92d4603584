"""The calls beside Generate, in both clients."""

from __future__ import annotations

import asyncio
from typing import Any

import aptserve
import pytest
from aptserve import ModelInfo, PlanReport, Tier, TokenCount
from aptserve.v1 import admin_pb2, inference_pb2, types_pb2
from support.fake_service import FakeService


async def test_abort(api: Any, service: FakeService) -> None:
    service.responses["Abort"] = inference_pb2.AbortResponse(aborted_request_ids=["a"])
    assert await api.call("abort", "a", "b") == ("a",)
    assert list(service.requests[0].request_ids) == ["a", "b"]
    with pytest.raises(aptserve.InvalidArgumentError):
        await api.call("abort")


async def test_get_model(api: Any, service: FakeService) -> None:
    service.responses["GetModel"] = inference_pb2.GetModelResponse(
        model="m",
        architecture="OPTForCausalLM",
        context_length=10,
        vocab_size=20,
        eos_token_ids=[2],
        has_tokenizer=True,
        tiers=[types_pb2.CACHE_TIER_KV, types_pb2.CACHE_TIER_HIDDEN],
    )
    expected = ModelInfo("m", "OPTForCausalLM", 10, 20, (2,), True, (Tier.KV, Tier.HIDDEN))
    assert await api.call("get_model", "m") == expected
    assert await api.call("get_model") == expected
    assert [request.model for request in service.requests] == ["m", ""]


async def test_count_tokens(api: Any, service: FakeService) -> None:
    response = inference_pb2.CountTokensResponse(num_tokens=2, token_ids=[5, 6])
    service.responses["CountTokens"] = response
    assert await api.call("count_tokens", "hé", model="m") == TokenCount(2, (5, 6))
    assert (service.requests[0].text, service.requests[0].model) == ("hé", "m")
    with pytest.raises(aptserve.InvalidArgumentError):
        await api.call("count_tokens", "\ud800")


async def test_status(api: Any, service: FakeService) -> None:
    service.responses["GetStatus"] = admin_pb2.GetStatusResponse(policy="apt", num_running=3)
    status = await api.call("status")
    assert (status.policy, status.num_running, status.workers) == ("apt", 3, ())


async def test_drain(api: Any, service: FakeService) -> None:
    service.responses["Drain"] = admin_pb2.DrainResponse(num_unfinished=2)
    assert await api.call("drain", 1.5) == 2
    assert (service.requests[0].timeout.seconds, service.requests[0].timeout.nanos) == (
        1,
        5 * 10**8,
    )
    assert service.time_remaining[0] is not None
    assert service.time_remaining[0] > 1.5, "the service's own time-out comes first"
    with pytest.raises(aptserve.InvalidArgumentError):
        await api.call("drain", 0)


async def test_watch_plans_until_cancelled(api: Any, service: FakeService) -> None:
    service.plans = [admin_pb2.WatchPlansResponse(worker_id="w", plan_id=n) for n in (1, 2)]
    stream = await api.watch("w")
    plans = [await api.next(stream) for _ in range(2)]
    assert all(isinstance(plan, PlanReport) for plan in plans)
    assert [plan.plan_id for plan in plans] == [1, 2]
    assert service.requests[0].worker_id == "w"
    reading = asyncio.create_task(api.next(stream))
    await asyncio.sleep(0)
    stream.cancel()
    assert await reading is None


async def test_calls_have_a_deadline(make_api: Any, service: FakeService) -> None:
    service.responses["GetStatus"] = admin_pb2.GetStatusResponse()
    await make_api(service.address, timeout=4).call("status")
    assert service.time_remaining[0] is not None
    assert 2 < service.time_remaining[0] < 5
