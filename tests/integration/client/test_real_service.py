"""SDK, scheduler service and worker session together; only the model is a fake."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aptserve
import pytest
from aptserve import FinishReason, Tier
from aptserve_scheduler.config import SchedulerSettings
from aptserve_scheduler.core import RequestSpec
from aptserve_scheduler.service import SchedulerService
from aptserve_scheduler.stream import RequestStream
from aptserve_worker.fake import FakeModel, FakeWorker, Fault, FaultKind, expected_tokens
from aptserve_worker.plan import Sampling
from support.eventually import eventually

PROMPT = "once upon a time"
NUM_TOKENS = 12


@asynccontextmanager
async def serving(port: int = 0, **settings: Any) -> AsyncIterator[SchedulerService]:
    """A scheduler service that stops without a drain."""
    settings = {"drain_grace_seconds": 0, "log_level": "error", **settings}
    async with SchedulerService(SchedulerSettings(listen=f"127.0.0.1:{port}", **settings)) as it:
        yield it


@pytest.fixture
async def scheduler() -> AsyncIterator[SchedulerService]:
    async with serving() as service:
        yield service


def expected(
    max_tokens: int = NUM_TOKENS, *, model: FakeModel | None = None, **sampling: Any
) -> list[int]:
    fields: dict[str, Any] = {"max_tokens": max_tokens, "seed": 0, **sampling}
    tokens, _ = expected_tokens(model or FakeModel(), PROMPT.encode(), Sampling(**fields))
    return tokens


def is_idle(service: SchedulerService, *workers: FakeWorker) -> bool:
    """No request left anywhere and no unit in use."""
    service.driver.check_integrity()
    return service.driver.num_pending == 0 and all(
        worker.engine.num_free_units == worker.engine.model.num_units for worker in workers
    )


async def test_streams_text_and_tokens(
    make_api: Any, scheduler: SchedulerService, read: Any
) -> None:
    async with FakeWorker(scheduler.address) as worker:
        api = make_api(scheduler.address)
        stream = await api.open(PROMPT, max_tokens=NUM_TOKENS, request_id="mine", logprobs=2)
        chunks = await read(api, stream)
        result = stream.result
        assert list(result.token_ids) == expected()
        assert result.text == bytes(expected()).decode() == "".join(c.text for c in chunks)
        assert [p.chosen.token_id for p in result.logprobs] == expected()
        assert all(len(p.top) == 2 for p in result.logprobs)
        assert (result.request_id, result.model) == ("mine", "fake")
        assert result.finish_reason is FinishReason.LENGTH
        assert result.usage == aptserve.Usage(len(PROMPT), NUM_TOKENS)
        assert result.timing.time_to_first_token_seconds is not None
        assert result.timing.total_seconds >= result.timing.time_to_first_token_seconds
        await eventually(lambda: is_idle(scheduler, worker))


@pytest.mark.parametrize("depth", [1, 2])
async def test_many_requests_in_a_small_pool(make_api: Any, depth: int) -> None:
    model = FakeModel(num_units=24, block_size=4)
    async with (
        serving(pipeline_depth=depth, policy="apt") as scheduler,
        FakeWorker(scheduler.address, model=model) as worker,
    ):
        api = make_api(scheduler.address)
        results = await asyncio.gather(
            *(api.call("complete", PROMPT, max_tokens=NUM_TOKENS, timeout=30) for _ in range(8))
        )
        assert all(list(result.token_ids) == expected() for result in results)
        await eventually(lambda: is_idle(scheduler, worker))
        worker.engine.check_integrity()


async def test_hints_reach_the_core(
    make_api: Any, scheduler: SchedulerService, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs: list[RequestSpec] = []
    submit = scheduler.driver.submit

    def record(spec: RequestSpec, stream: RequestStream) -> None:
        specs.append(spec)
        submit(spec, stream)

    monkeypatch.setattr(scheduler.driver, "submit", record)
    async with FakeWorker(scheduler.address):
        hints = {"tenant": "team", "priority": 5, "expected_output_tokens": 3}
        await make_api(scheduler.address).call("complete", PROMPT, max_tokens=4, **hints)
    [spec] = specs
    assert {name: getattr(spec, name) for name in hints} == hints


async def test_stop_rules(make_api: Any, scheduler: SchedulerService) -> None:
    model = FakeModel(eos_after=6)
    async with FakeWorker(scheduler.address, model=model):
        api = make_api(scheduler.address)
        result = await api.call("complete", PROMPT)
        assert result.finish_reason is FinishReason.STOP
        assert result.matched_stop_token_id == 256
        text = bytes(expected(6)[:5]).decode()
        assert result.text == text
        result = await api.call("complete", PROMPT, stop_strings=[text[2:4]])
        assert result.text == text[: text.index(text[2:4])]
        assert result.matched_stop_string == text[2:4]


async def test_abort(make_api: Any, scheduler: SchedulerService, read: Any) -> None:
    async with FakeWorker(scheduler.address) as worker:
        api = make_api(scheduler.address)
        stream = await api.open(PROMPT, max_tokens=500, request_id="mine")
        await api.next(stream)
        worker.gate.hold()
        assert await api.call("abort", "mine", "other") == ("mine",)
        worker.gate.open()
        await read(api, stream)
        assert stream.result.finish_reason is FinishReason.ABORT
        assert await api.call("abort", "mine") == ()
        await eventually(lambda: is_idle(scheduler, worker))


async def test_cancel_frees_everything(make_api: Any, scheduler: SchedulerService) -> None:
    async with FakeWorker(scheduler.address, step_seconds=0.001) as worker:
        api = make_api(scheduler.address)
        stream = await api.open(PROMPT, max_tokens=2000)
        await api.next(stream)
        stream.cancel()
        await eventually(lambda: is_idle(scheduler, worker))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"model": "other"}, aptserve.NotFoundError),
        ({"max_tokens": 100_000}, aptserve.InvalidArgumentError),
        ({"stop_token_ids": [300]}, aptserve.InvalidArgumentError),
        ({"resume_token_ids": [300]}, aptserve.InvalidArgumentError),
        ({"timeout": 0.05}, aptserve.DeadlineExceededError),
    ],
)
async def test_errors_are_mapped(
    make_api: Any,
    scheduler: SchedulerService,
    arguments: dict[str, Any],
    error: type[aptserve.AptServeError],
) -> None:
    async with FakeWorker(scheduler.address) as worker:
        worker.gate.hold()
        api = make_api(scheduler.address)
        with pytest.raises(error) as caught:
            await api.call("complete", PROMPT, **arguments)
        if isinstance(caught.value, aptserve.InvalidArgumentError):
            assert next(iter(arguments)) in caught.value.field
        worker.gate.open()
        await eventually(lambda: is_idle(scheduler, worker))


async def test_state_of_the_service_is_mapped(make_api: Any) -> None:
    async with serving(api_key="key", join_token="join", max_waiting=1) as scheduler:
        with pytest.raises(aptserve.UnauthenticatedError):
            await make_api(scheduler.address).call("get_model")
        api = make_api(scheduler.address, api_key="key")
        with pytest.raises(aptserve.UnavailableError):
            await api.call("complete", PROMPT)
        model = FakeModel(tokenizer_json=b"", max_num_seqs=1)
        async with FakeWorker(scheduler.address, model=model, join_token="join") as worker:
            with pytest.raises(aptserve.FailedPreconditionError):
                await api.call("complete", PROMPT)
            worker.gate.hold()
            tokens = list(PROMPT.encode())
            streams = [await api.open(token_ids=tokens, request_id="mine")]
            await eventually(lambda: worker.gate.is_waiting)
            with pytest.raises(aptserve.AlreadyExistsError):
                await api.call("complete", token_ids=tokens, request_id="mine")
            streams.append(await api.open(token_ids=tokens))
            await eventually(lambda: scheduler.driver.num_pending == 2)
            with pytest.raises(aptserve.ResourceExhaustedError) as caught:
                await api.call("complete", token_ids=tokens)
            assert caught.value.retry_after_seconds is not None
            for stream in streams:
                stream.cancel()
            worker.gate.open()
            await eventually(lambda: is_idle(scheduler, worker))


async def test_model_tokens_status_and_plans(make_api: Any, scheduler: SchedulerService) -> None:
    async with FakeWorker(scheduler.address, worker_id="w1") as worker:
        api = make_api(scheduler.address)
        model = await api.call("get_model")
        assert (model.name, model.tiers) == ("fake", (Tier.KV, Tier.HIDDEN))
        count = await api.call("count_tokens", "hé")
        assert count.token_ids == tuple("hé".encode())
        plans = await api.watch("w1")
        reading = asyncio.create_task(api.next(plans))

        async def seen() -> bool:
            await api.call("complete", PROMPT, max_tokens=2, request_id="watched")
            return reading.done()

        await eventually(seen)
        plan = await reading
        assert plan.worker_id == "w1"
        assert [part.request_id for part in plan.planned] == ["watched"]
        assert plan.reason
        plans.cancel()
        status = await api.call("status")
        assert status.accepting
        assert status.workers[0].worker_id == "w1"
        assert status.workers[0].num_units == worker.engine.model.num_units
        assert status.totals.num_finished >= 1


async def test_drain(make_api: Any, scheduler: SchedulerService) -> None:
    async with FakeWorker(scheduler.address):
        api = make_api(scheduler.address)
        assert await api.call("drain", 5.0) == 0
        with pytest.raises(aptserve.UnavailableError):
            await api.call("complete", PROMPT)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}], ids=["greedy", "sampled"])
async def test_scheduler_restarts_and_streams_go_on(
    make_api: Any, read: Any, sampling: dict[str, Any]
) -> None:
    async with AsyncExitStack() as stack:
        async with serving() as scheduler:
            port = int(scheduler.address.rpartition(":")[2])
            worker = await stack.enter_async_context(FakeWorker(scheduler.address))
            api = make_api(scheduler.address)
            worker.gate.hold()
            stream = await api.open(PROMPT, max_tokens=NUM_TOKENS, logprobs=1, **sampling)
            worker.gate.allow(5)
            chunks = [await api.next(stream)]
            while len(stream.token_ids) < 4:
                chunks.append(await api.next(stream))
        worker.gate.open()
        async with serving(port) as scheduler:
            await worker.wait_attached(num_attachments=2)
            chunks += await read(api, stream)
            await eventually(lambda: is_idle(scheduler, worker))
    result = stream.result
    assert stream.num_resumes >= 1
    assert result.token_ids == tuple(t for c in chunks for t in c.token_ids)
    assert result.text == "".join(c.text for c in chunks) == bytes(result.token_ids).decode()
    assert [p.chosen.token_id for p in result.logprobs] == list(result.token_ids)
    assert result.usage.num_output_tokens == NUM_TOKENS
    if not sampling:
        assert list(result.token_ids) == expected()


async def test_characters_of_many_tokens_survive_a_restart(make_api: Any, read: Any) -> None:
    """Whatever part of a character was received: the text has it once and whole."""
    letters = tuple("é€😀".encode())
    model = FakeModel(alphabet=letters)
    async with serving() as scheduler:
        port = int(scheduler.address.rpartition(":")[2])
        async with FakeWorker(scheduler.address, model=model) as worker:
            api = make_api(scheduler.address)
            whole = await api.call("complete", PROMPT, max_tokens=40)
            worker.gate.hold()
            stream = await api.open(PROMPT, max_tokens=40)
            worker.gate.allow(9)
            while len(stream.token_ids) < 8:
                await api.next(stream)
    async with serving(port) as scheduler, FakeWorker(scheduler.address, model=model):
        await read(api, stream)
    assert stream.num_resumes >= 1
    assert stream.result.token_ids == whole.token_ids
    assert stream.result.text == whole.text


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(3, FaultKind.ERROR)],
        [Fault(3, FaultKind.PLAN_ERROR)],
        [Fault(3, FaultKind.DROP_STREAM), Fault(6, FaultKind.OUT_OF_MEMORY)],
        [Fault(2, FaultKind.WRONG_PLAN_ID)],
        [Fault(2, FaultKind.DUPLICATE_REPLY)],
    ],
    ids=lambda faults: faults[0].kind.value,
)
async def test_client_does_not_see_a_worker_fail(
    make_api: Any, scheduler: SchedulerService, faults: Sequence[Fault]
) -> None:
    async with FakeWorker(scheduler.address, faults=faults) as worker:
        result = await make_api(scheduler.address).call("complete", PROMPT, max_tokens=NUM_TOKENS)
        assert list(result.token_ids) == expected()
        await eventually(lambda: worker.session.num_attachments >= 2)
        await worker.wait_attached(num_attachments=2)
        await eventually(lambda: is_idle(scheduler, worker))


async def test_another_worker_takes_over(make_api: Any, scheduler: SchedulerService) -> None:
    async with FakeWorker(scheduler.address) as first:
        first.gate.hold()
        api = make_api(scheduler.address)
        stream = await api.open(PROMPT, max_tokens=NUM_TOKENS)
        first.gate.allow(4)
        while len(stream.token_ids) < 3:
            await api.next(stream)
        async with FakeWorker(scheduler.address) as second:
            await first.kill()
            while await api.next(stream) is not None:
                pass
            await eventually(lambda: is_idle(scheduler, second))
    assert list(stream.result.token_ids) == expected()
    assert stream.num_resumes == 0, "the scheduler hides it"


async def test_worker_leaves_while_it_works(make_api: Any, scheduler: SchedulerService) -> None:
    async with FakeWorker(scheduler.address, step_seconds=0.002) as first:
        api = make_api(scheduler.address)
        stream = await api.open(PROMPT, max_tokens=NUM_TOKENS)
        await api.next(stream)
        async with FakeWorker(scheduler.address):
            await first.leave()
            while await api.next(stream) is not None:
                pass
    assert list(stream.result.token_ids) == expected()


async def test_failed_sequence_is_an_internal_error(
    make_api: Any, scheduler: SchedulerService
) -> None:
    async with FakeWorker(scheduler.address, faults=[Fault(2, FaultKind.NAN)]) as worker:
        api = make_api(scheduler.address)
        with pytest.raises(aptserve.InternalError):
            await api.call("complete", PROMPT)
        result = await api.call("complete", PROMPT, max_tokens=NUM_TOKENS)
        assert list(result.token_ids) == expected()
        await eventually(lambda: is_idle(scheduler, worker))
