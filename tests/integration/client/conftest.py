from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aptserve import AsyncClient, Chunk, Client
from aptserve._channel import SERVICE_CONFIG
from support.fake_service import FakeService, fake_service

TIMEOUT_SECONDS = 30.0


@pytest.fixture
def service() -> Any:
    with fake_service() as service:
        yield service


class SyncApi:
    """The sync client behind coroutines, each call on a thread of its own."""

    def __init__(self, address: str, **settings: Any) -> None:
        self.client = Client(address, **settings)

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            return await asyncio.to_thread(getattr(self.client, method), *args, **kwargs)

    async def open(self, *args: Any, **kwargs: Any) -> Any:
        return self.client.generate(*args, **kwargs)

    async def watch(self, *args: Any) -> Any:
        return self.client.watch_plans(*args)

    async def next(self, stream: Any) -> Any:
        """The next item, ``None`` at the end."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            return await asyncio.to_thread(next, stream, None)

    async def close(self) -> None:
        await asyncio.to_thread(self.client.close)


class AsyncApi:
    """The async client."""

    def __init__(self, address: str, **settings: Any) -> None:
        self.client = AsyncClient(address, **settings)

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            return await getattr(self.client, method)(*args, **kwargs)

    async def open(self, *args: Any, **kwargs: Any) -> Any:
        return self.client.generate(*args, **kwargs)

    async def watch(self, *args: Any) -> Any:
        return self.client.watch_plans(*args)

    async def next(self, stream: Any) -> Any:
        """The next item, ``None`` at the end."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            return await anext(stream, None)

    async def close(self) -> None:
        await self.client.close()


Api = SyncApi | AsyncApi
MakeApi = Callable[..., Api]


@pytest.fixture(params=[SyncApi, AsyncApi], ids=["sync", "async"])
async def make_api(request: pytest.FixtureRequest) -> AsyncIterator[MakeApi]:
    """Makes clients of one kind that are closed at the end."""
    apis: list[Api] = []
    quick_retries = SERVICE_CONFIG.replace('"0.1s"', '"0.01s"').replace('"1s"', '"0.01s"')

    def make(address: str, **settings: Any) -> Api:
        settings.setdefault("channel_options", [("grpc.service_config", quick_retries)])
        apis.append(request.param(address, **settings))
        return apis[-1]

    yield make
    for api in apis:
        await api.close()


@pytest.fixture
def api(make_api: MakeApi, service: FakeService) -> Api:
    """A client of the fake service."""
    return make_api(service.address)


async def read_all(api: Api, stream: Any) -> list[Chunk]:
    """All chunks until the stream ends."""
    chunks = []
    while (chunk := await api.next(stream)) is not None:
        chunks.append(chunk)
    return chunks


@pytest.fixture
def read() -> Callable[[Api, Any], Any]:
    return read_all
