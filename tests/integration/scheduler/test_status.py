"""GetStatus tells enough of a worker to imitate it."""

from __future__ import annotations

from aptserve.v1 import admin_pb2, types_pb2
from aptserve_worker.fake import FakeWorker
from support.scheduling import CALL_SECONDS, Serving


async def test_status_says_what_a_simulator_must_know_of_a_worker(
    served: Serving, worker: FakeWorker
) -> None:
    status = await served.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=CALL_SECONDS)
    [shown] = status.workers
    model = worker.engine.model
    assert (shown.num_units, shown.block_size) == (model.num_units, model.block_size)
    limits = (shown.max_num_seqs, shown.max_num_batched_tokens)
    assert limits == (model.max_num_seqs, model.max_num_batched_tokens)
    tiers = [(tier.tier, tier.units_per_block, tier.exact) for tier in shown.tiers]
    assert tiers == [
        (types_pb2.CACHE_TIER_KV, 2, True),
        (types_pb2.CACHE_TIER_HIDDEN, 1, True),
    ]
    speed = shown.calibration
    assert speed.base_seconds == model.calibration.base_seconds
    assert speed.seconds_per_token == model.calibration.seconds_per_token
    assert [(tier.tier, tier.seconds_per_cached_token) for tier in speed.tiers] == [
        (tier.tier, tier.seconds_per_cached_token) for tier in shown.tiers
    ]
