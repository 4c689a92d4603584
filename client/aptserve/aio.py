"""The asynchronous client: :class:`aptserve.Client` with ``await`` and ``async for``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import grpc.aio

from aptserve import _wire
from aptserve._aio_streams import AsyncGenerateStream, AsyncPlanStream
from aptserve._base import (
    ClientBase,
    abort_request,
    count_tokens_request,
    drain_request,
    map_error,
)
from aptserve._channel import DRAIN_MARGIN_SECONDS
from aptserve._request import SamplingOptions
from aptserve.errors import CancelledError
from aptserve.hints import Hints
from aptserve.sampling import SamplingParams
from aptserve.types import (
    Completion,
    ModelInfo,
    Objectives,
    Status,
    TokenCount,
)
from aptserve.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

# ruff: noqa: ASYNC109 - a time-out here is the deadline of the call, which the service sees too


class AsyncClient(ClientBase):
    """A client of one service. Every call raises errors of the :class:`AptServeError` tree.

    Belongs to the event loop that makes its first call. Do not carry it into a forked process.
    """

    def _set_up(self) -> None:
        self._channel: Any = None
        self._is_closed = False

    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        sampling: SamplingParams | None = None,
        objectives: Objectives | None = None,
        request_id: str | None = None,
        model: str | None = None,
        timeout: float | None = None,
        resume_token_ids: Sequence[int] | None = None,
        tenant: str | None = None,
        priority: int = 0,
        expected_output_tokens: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncGenerateStream:
        """Continue a prompt, given as text or as token ids, and iterate over the answer's chunks.

        Sampling fields may be given directly (``max_tokens=…, temperature=…``) instead of
        ``sampling``. ``timeout`` bounds the whole answer in seconds. ``resume_token_ids`` are
        output tokens that the caller holds from an earlier call; they are not sent again.
        The service's policy may look at ``tenant`` (whose request it is), ``priority`` (-100 to
        100, higher is more urgent) and ``expected_output_tokens`` (a guess of the answer's length).
        Needs a running event loop, which sends the request as soon as it gets a turn; what the
        service refuses is raised by the iteration, what is wrong by itself here
        (:class:`InvalidArgumentError`).
        """
        self._connect()
        generation = self._new_generation(
            prompt,
            options,
            token_ids=token_ids,
            sampling=sampling,
            objectives=objectives,
            request_id=request_id,
            model=model,
            timeout=timeout,
            resume_token_ids=resume_token_ids,
            hints=Hints(tenant or "", priority, expected_output_tokens),
        )
        return AsyncGenerateStream(generation, self._open_generate)

    async def complete(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        sampling: SamplingParams | None = None,
        objectives: Objectives | None = None,
        request_id: str | None = None,
        model: str | None = None,
        timeout: float | None = None,
        resume_token_ids: Sequence[int] | None = None,
        tenant: str | None = None,
        priority: int = 0,
        expected_output_tokens: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion:
        """The whole answer; arguments as for :meth:`generate`."""
        stream = self.generate(
            prompt,
            token_ids=token_ids,
            sampling=sampling,
            objectives=objectives,
            request_id=request_id,
            model=model,
            timeout=timeout,
            resume_token_ids=resume_token_ids,
            tenant=tenant,
            priority=priority,
            expected_output_tokens=expected_output_tokens,
            **options,
        )
        async with stream:
            async for _ in stream:
                pass
        return stream.result

    async def abort(self, *request_ids: str) -> tuple[str, ...]:
        """End requests; their streams finish with ``ABORT``. Returns the ids that were running."""
        request = abort_request(request_ids)
        response = await self._call(self._inference().Abort, request)
        return tuple(response.aborted_request_ids)

    async def get_model(self, model: str | None = None) -> ModelInfo:
        """Describe the served model, which must have this name if one is given."""
        request = inference_pb2.GetModelRequest(model=model or "")
        return _wire.model_from_proto(await self._call(self._inference().GetModel, request))

    async def count_tokens(self, text: str, *, model: str | None = None) -> TokenCount:
        """Tokens of a text as a prompt would have them."""
        request = count_tokens_request(text, model)
        response = await self._call(self._inference().CountTokens, request)
        return _wire.token_count_from_proto(response)

    async def status(self) -> Status:
        """What is attached, what waits, what runs."""
        response = await self._call(self._admin().GetStatus, admin_pb2.GetStatusRequest())
        return _wire.status_from_proto(response)

    def watch_plans(self, worker_id: str | None = None) -> AsyncPlanStream:
        """Every plan from now on, of one worker or of all."""
        request = admin_pb2.WatchPlansRequest(worker_id=worker_id or "")
        return AsyncPlanStream(self._admin().WatchPlans(request, metadata=self._target.metadata))

    async def drain(self, timeout: float = 30.0) -> int:
        """Let the service refuse new requests and wait, at most so many seconds, for those it has.

        Returns how many still run.
        """
        response = await self._call(
            self._admin().Drain, drain_request(timeout), timeout=timeout + DRAIN_MARGIN_SECONDS
        )
        return int(response.num_unfinished)

    async def close(self) -> None:
        """End all calls and the connection. May be called twice."""
        self._is_closed = True
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _connect(self) -> Any:
        """The channel, made by the first call: it binds to the running event loop."""
        if self._is_closed:
            raise RuntimeError("the client is closed")
        if self._channel is None:
            asyncio.get_running_loop()
            target = self._target
            if target.credentials is None:
                self._channel = grpc.aio.insecure_channel(target.address, options=target.options)
            else:
                self._channel = grpc.aio.secure_channel(
                    target.address, target.credentials, options=target.options
                )
        return self._channel

    def _inference(self) -> Any:
        return inference_pb2_grpc.InferenceServiceStub(self._connect())

    def _admin(self) -> Any:
        return admin_pb2_grpc.AdminServiceStub(self._connect())

    def _open_generate(self, request: inference_pb2.GenerateRequest, timeout: float | None) -> Any:
        if self._is_closed:
            raise CancelledError("the client is closed")
        return self._inference().Generate(request, timeout=timeout, metadata=self._target.metadata)

    async def _call(self, method: Any, request: Any, *, timeout: float | None = None) -> Any:
        try:
            return await method(
                request, timeout=timeout or self._timeout, metadata=self._target.metadata
            )
        except grpc.RpcError as error:
            raise map_error(error) from error
