"""Client → scheduler → worker → client: the tokens are transformers' own, whatever happens."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from aptserve import FinishReason, InvalidArgumentError
from aptserve_scheduler.policies import policy_names, registry
from aptserve_worker.engine import LaunchedStep, ModelEngine
from aptserve_worker.plan import BatchPlan
from support.cluster import Cluster, cluster
from support.eventually import eventually
from support.models import CONTEXT, VOCAB, greedy
from support.policies import MixingPolicy
from transformers import PreTrainedModel

Checkpoints = Callable[[str], Path]
Oracles = Callable[[str], PreTrainedModel]

TIGHT = {"pool_units": 44, "tiers": "kv,hidden"}
"""Units for five and a half of the longest requests in KV; blocks of 4 tokens."""


def make_prompts(count: int, longest: int = 20, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(count)]


async def assert_exact(
    running: Cluster, oracle: PreTrainedModel, prompts: list[list[int]], num_tokens: int
) -> None:
    answers = await running.complete_all(prompts, max_tokens=num_tokens)
    assert answers == [greedy(oracle, p, num_tokens) for p in prompts]
    await eventually(lambda: running.assert_empty() is None)


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama", "llama-grouped", "qwen2"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("policy", ["apt", "fcfs"])
async def test_tokens_equal_generate(
    name: str, depth: int, policy: str, checkpoint: Checkpoints, oracle: Oracles
):
    scheduler = {"policy": policy, "pipeline_depth": depth}
    async with cluster(checkpoint(name), scheduler=scheduler) as running:
        await assert_exact(running, oracle(name), make_prompts(12), 10)


@pytest.mark.parametrize("policy", policy_names())
async def test_every_policy_serves(policy: str, checkpoint: Checkpoints, oracle: Oracles):
    async with cluster(checkpoint("opt"), scheduler={"policy": policy}, **TIGHT) as running:
        await assert_exact(running, oracle("opt"), make_prompts(12, seed=11), 8)


async def test_two_workers_share_one_queue(checkpoint: Checkpoints, oracle: Oracles):
    async with cluster(checkpoint("opt"), num_workers=2, max_num_seqs=4) as running:
        await assert_exact(running, oracle("opt"), make_prompts(30), 10)
        assert all(w.num_steps > 0 for w in running.service.driver.snapshot().workers)


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize("policy", ["apt", "fcfs"])
@pytest.mark.parametrize("depth", [1, 2])
async def test_under_a_pool_too_small_for_all(
    name: str, policy: str, depth: int, checkpoint: Checkpoints, oracle: Oracles
):
    """Requests wait and lose their memory; every one still ends with the right tokens."""
    scheduler = {"policy": policy, "pipeline_depth": depth}
    async with cluster(checkpoint(name), scheduler=scheduler, **TIGHT) as running:
        await assert_exact(running, oracle(name), make_prompts(24, seed=3), 14)
        totals = running.service.driver.snapshot().totals
        assert totals.num_preemptions > 0
        assert totals.num_finished == 24


@pytest.mark.parametrize("graphs", ["off", "eager"])
@pytest.mark.parametrize("policy", ["apt", "fcfs", "mixing"])
async def test_steps_launched_ahead_of_their_results(
    policy: str,
    graphs: str,
    checkpoint: Checkpoints,
    oracle: Oracles,
    monkeypatch: pytest.MonkeyPatch,
):
    """Preempted, promoted and ended while the next step is under way: the same tokens."""
    monkeypatch.setitem(registry._FACTORIES, "mixing", MixingPolicy)
    num_under_way: list[int] = []
    launch = ModelEngine.launch

    def watched(engine: ModelEngine, plan: BatchPlan) -> LaunchedStep:
        num_under_way.append(len(engine._launched))
        return launch(engine, plan)

    monkeypatch.setattr(ModelEngine, "launch", watched)
    scheduler = {"policy": policy, "pipeline_depth": 2}
    worker = {"overlap": "on", "graphs": graphs, "max_num_seqs": 16, **TIGHT}
    async with cluster(checkpoint("opt"), scheduler=scheduler, **worker) as running:
        await assert_exact(running, oracle("opt"), make_prompts(24, seed=3), 14)
        assert running.service.driver.snapshot().totals.num_finished == 24
    assert set(num_under_way) == {0, 1}


async def test_hidden_and_kv_mix_and_hidden_is_promoted(
    checkpoint: Checkpoints, oracle: Oracles, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(registry._FACTORIES, "mixing", MixingPolicy)
    async with cluster(checkpoint("opt"), scheduler={"policy": "mixing"}, **TIGHT) as running:
        tiers_of_plans: list[set[str]] = []
        promoted: list[str] = []

        async def watch() -> None:
            async with running.client.watch_plans() as plans:
                async for plan in plans:
                    tiers_of_plans.append({p.tier.value for p in plan.planned})
                    promoted.extend(plan.promoted_request_ids)

        watcher = asyncio.create_task(watch())
        try:
            await assert_exact(running, oracle("opt"), make_prompts(24, seed=5), 14)
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
        assert any(len(tiers) == 2 for tiers in tiers_of_plans), "no batch held both tiers"
        assert promoted


async def test_a_worker_dies_and_its_requests_go_on_elsewhere(
    checkpoint: Checkpoints, oracle: Oracles
):
    prompts = make_prompts(8, seed=7)
    async with cluster(checkpoint("opt"), num_workers=2, max_num_seqs=5) as running:
        streams = [running.client.generate(token_ids=p, max_tokens=30) for p in prompts]
        seen: list[list[int]] = [[] for _ in prompts]

        async def read(i: int) -> None:
            async for chunk in streams[i]:
                seen[i] += chunk.token_ids

        readers = [asyncio.create_task(read(i)) for i in range(len(prompts))]
        await eventually(lambda: all(len(s) >= 2 for s in seen[:4]))
        await running.workers.pop(0).kill()
        await asyncio.wait_for(asyncio.gather(*readers), 30)
        assert seen == [greedy(oracle("opt"), p, 30) for p in prompts]
        await eventually(lambda: running.assert_empty() is None)


async def test_a_client_that_disconnects_frees_its_units_by_the_next_plan(
    checkpoint: Checkpoints, oracle: Oracles
):
    async with cluster(checkpoint("opt")) as running:
        keep = running.client.generate(token_ids=[5, 6], max_tokens=60, ignore_eos=True)
        leave = running.client.generate(
            token_ids=[7] * 20, max_tokens=40, request_id="leaves", ignore_eos=True
        )
        await anext(leave)
        gone = asyncio.Event()
        late: list[int] = []

        async def watch() -> None:
            async with running.client.watch_plans() as plans:
                async for plan in plans:
                    names = [p.request_id for p in plan.planned]
                    late.extend([plan.plan_id] if gone.is_set() and "leaves" in names else [])

        watcher = asyncio.create_task(watch())
        leave.cancel()
        await eventually(lambda: running.service.driver.snapshot().totals.num_aborted == 1)
        gone.set()
        assert running.service.driver.snapshot().num_running <= 1
        tokens = [t async for chunk in keep for t in chunk.token_ids]
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        assert late == []
        assert len(tokens) == 60
        await eventually(lambda: running.assert_empty() is None)


async def test_bad_requests_leave_a_batch_in_flight_alone(checkpoint: Checkpoints, oracle: Oracles):
    prompts = make_prompts(6, seed=11)
    async with cluster(checkpoint("opt")) as running:
        good = asyncio.gather(
            *(running.client.complete(token_ids=p, max_tokens=20) for p in prompts)
        )
        for bad, field in [
            ({"token_ids": [5] * (CONTEXT + 1)}, "token_ids"),
            ({"token_ids": [VOCAB]}, "token_ids"),
            ({"token_ids": [5], "max_tokens": CONTEXT + 1}, "sampling.max_tokens"),
            ({"token_ids": [5], "stop_token_ids": [VOCAB + 3]}, "sampling.stop_token_ids"),
        ]:
            with pytest.raises(InvalidArgumentError) as refused:
                await running.client.complete(**bad)
            assert refused.value.field.startswith(field)
        answers = [list(c.token_ids) for c in await good]
        assert answers == [greedy(oracle("opt"), p, 20) for p in prompts]
        await eventually(lambda: running.assert_empty() is None)


async def test_sampling_with_a_seed_survives_preemption_and_company(checkpoint: Checkpoints):
    sampling = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 14}
    prompts = make_prompts(20, seed=13)

    async def run(running: Cluster, indices: list[int]) -> list[list[int]]:
        answers = await asyncio.gather(
            *(running.client.complete(token_ids=prompts[i], seed=i, **sampling) for i in indices)
        )
        return [list(a.token_ids) for a in answers]

    async with cluster(checkpoint("opt")) as running:
        alone = [(await run(running, [i]))[0] for i in range(len(prompts))]
    async with cluster(checkpoint("opt"), **TIGHT) as running:
        assert await run(running, list(range(len(prompts)))) == alone
        assert running.service.driver.snapshot().totals.num_preemptions > 0


async def test_stop_tokens_and_the_context_end_a_request(checkpoint: Checkpoints, oracle: Oracles):
    answer = greedy(oracle("opt"), [11, 12, 13], 8)
    async with cluster(checkpoint("opt")) as running:
        stopped = await running.client.complete(
            token_ids=[11, 12, 13], max_tokens=8, stop_token_ids=[answer[3]]
        )
        assert stopped.finish_reason is FinishReason.STOP
        assert list(stopped.token_ids) == answer[: answer.index(answer[3]) + 1]
        full = await running.client.complete(token_ids=[5] * (CONTEXT - 2), ignore_eos=True)
        assert full.finish_reason is FinishReason.LENGTH
        assert full.usage.num_output_tokens == 3
