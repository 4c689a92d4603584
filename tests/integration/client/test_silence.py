"""A peer that falls silent without closing its connection is noticed, on both links.

The shipped times are seconds; the tests keep the options and shorten the times.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import aptserve
import pytest
from aptserve._channel import make_target
from aptserve_worker import session
from aptserve_worker.fake import FakeWorker
from support.eventually import eventually
from support.fake_gateway import fake_gateway
from support.fake_service import WAIT_SECONDS, FakeService, chunk, started
from support.tcp_proxy import tcp_proxy

QUICK = {
    "grpc.keepalive_time_ms": 300,
    "grpc.keepalive_timeout_ms": 200,
    "grpc.http2.ping_timeout_ms": 200,
}


def quicker(options: Any) -> tuple[tuple[str, Any], ...]:
    """The same options with short times; none may be missing."""
    assert QUICK.keys() <= dict(options).keys()
    return tuple((dict(options) | QUICK).items())


async def test_client_notices_a_silent_service(make_api: Any, service: FakeService) -> None:
    def hang(request: Any, context: Any) -> Iterator[Any]:
        gone = threading.Event()
        context.add_callback(gone.set)
        yield started()
        yield chunk("h")
        gone.wait(WAIT_SECONDS)

    service.script(hang)
    options = quicker(make_target(None, None, None, ()).options)
    async with tcp_proxy(service.address) as proxy:
        api = make_api(proxy.address, resume=False, channel_options=options)
        stream = await api.open("prompt")
        await api.next(stream)
        proxy.freeze()
        with pytest.raises(aptserve.UnavailableError):
            await api.next(stream)


async def test_worker_notices_a_silent_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "CHANNEL_OPTIONS", quicker(session.CHANNEL_OPTIONS))
    async with (
        fake_gateway() as gateway,
        tcp_proxy(gateway.address) as proxy,
        FakeWorker(proxy.address, wait=False) as worker,
    ):
        await gateway.accept()
        await worker.wait_attached()
        proxy.freeze()
        await eventually(lambda: not worker.session.attached)
