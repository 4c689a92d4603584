"""A service with one fake worker."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from aptserve_worker.fake import FakeWorker
from support.scheduling import Serving, serving


@pytest.fixture
async def served() -> AsyncIterator[Serving]:
    """A service with nobody attached."""
    async with serving() as running:
        yield running


@pytest.fixture
async def worker(served: Serving) -> AsyncIterator[FakeWorker]:
    """A fake worker attached to ``served``; afterwards nothing may be left on either side."""
    async with FakeWorker(served.address, worker_id="w1") as attached:
        yield attached
        attached.gate.open()
        await served.all_is_free()
        served.service.driver.check_integrity()
        attached.engine.check_integrity()
