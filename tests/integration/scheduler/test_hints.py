"""What a request says about itself reaches the core, from fields and from metadata."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from aptserve.errors import InvalidArgumentError, from_rpc_error
from aptserve.v1 import inference_pb2
from aptserve.v1.types_pb2 import FINISH_REASON_LENGTH, SamplingParams, TokenIds
from aptserve_scheduler.core import Objectives, RequestSpec
from aptserve_scheduler.driver import Driver
from aptserve_worker.fake import FakeModel, FakeWorker
from google.protobuf.duration_pb2 import Duration
from support.scheduling import CALL_SECONDS, Serving, collect, serving

TTFT = "x-llm-d-slo-ttft-ms"
TPOT = "x-llm-d-slo-tpot-ms"
TENANT = "x-llm-d-inference-fairness-id"


@pytest.fixture
def specs(monkeypatch: pytest.MonkeyPatch) -> list[RequestSpec]:
    """Every request that is handed to the core."""
    seen: list[RequestSpec] = []
    submit = Driver.submit

    def record(driver: Driver, spec: RequestSpec, stream: Any) -> None:
        seen.append(spec)
        submit(driver, spec, stream)

    monkeypatch.setattr(Driver, "submit", record)
    return seen


def call(served: Serving, metadata: dict[str, str] | None = None, **fields: Any) -> Any:
    request = inference_pb2.GenerateRequest(
        **{"text": "abc", "sampling": SamplingParams(max_tokens=3), **fields}
    )
    return served.inference.Generate(
        request, timeout=CALL_SECONDS, metadata=tuple((metadata or {}).items())
    )


async def test_fields_reach_the_core(
    served: Serving, worker: FakeWorker, specs: list[RequestSpec]
) -> None:
    await collect(call(served, tenant="team", priority=-7, expected_output_tokens=2))
    await collect(call(served))
    given, plain = specs
    assert (given.tenant, given.priority, given.expected_output_tokens) == ("team", -7, 2)
    assert (plain.tenant, plain.priority, plain.expected_output_tokens) == ("", 0, None)
    assert plain.objectives == Objectives(1.0, 1.0)


async def test_a_guess_beyond_max_tokens_is_max_tokens(
    served: Serving, worker: FakeWorker, specs: list[RequestSpec]
) -> None:
    await collect(call(served, expected_output_tokens=2**32 - 1))
    assert specs[0].expected_output_tokens == 3


async def test_metadata_fills_what_the_message_leaves_open(
    served: Serving, worker: FakeWorker, specs: list[RequestSpec]
) -> None:
    metadata = {TTFT: "1500", TPOT: "20.5", TENANT: "from metadata"}
    objectives = inference_pb2.Objectives(tbt=Duration(seconds=2))
    await collect(call(served, metadata))
    await collect(call(served, metadata, tenant="typed", objectives=objectives))
    plain, typed = specs
    assert plain.objectives == Objectives(1.5, pytest.approx(0.0205))
    assert plain.tenant == "from metadata"
    assert typed.objectives == Objectives(1.5, 2.0)
    assert typed.tenant == "typed"


@pytest.mark.parametrize(
    ("field", "metadata", "fields"),
    [
        ("tenant", {}, {"tenant": "x" * 129}),
        ("tenant", {}, {"tenant": "a\nb"}),
        ("priority", {}, {"priority": 101}),
        ("priority", {}, {"priority": -101}),
        ("expected_output_tokens", {}, {"expected_output_tokens": 0}),
        (TTFT, {TTFT: "soon"}, {}),
        (TPOT, {TPOT: "0"}, {}),
        (TENANT, {TENANT: "x" * 129}, {"tenant": "typed"}),
    ],
)
async def test_what_is_out_of_range_is_named(
    served: Serving, worker: FakeWorker, field: str, metadata: dict[str, str], fields: Any
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(call(served, metadata, **fields))
    error = from_rpc_error(caught.value)
    assert isinstance(error, InvalidArgumentError)
    assert error.field == field


async def test_a_length_that_nobody_asked_for_is_cut_to_the_memory() -> None:
    model = FakeModel(num_units=16, block_size=4)  # 8 KV blocks: 32 tokens
    async with serving() as served, FakeWorker(served.address, model=model):
        prompt = TokenIds(ids=[97] * 20)
        answer = await collect(call(served, text=None, token_ids=prompt, sampling=None))
        assert len(answer.token_ids) == 12
        resumed = [97] * 12
        finished = call(
            served, text=None, token_ids=prompt, sampling=None, resume_token_ids=resumed
        )
        assert (await collect(finished)).finished.finish_reason == FINISH_REASON_LENGTH
        for length, max_tokens in ((20, 13), (32, None)):
            prompt = TokenIds(ids=[97] * length)
            sampling = SamplingParams(max_tokens=max_tokens)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await collect(call(served, text=None, token_ids=prompt, sampling=sampling))
            error = from_rpc_error(caught.value)
            assert isinstance(error, InvalidArgumentError)
            assert error.field == "sampling.max_tokens"
