"""The API for applications."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import structlog
from aptserve.errors import InvalidArgumentError
from aptserve.v1 import inference_pb2, inference_pb2_grpc

from aptserve_scheduler.api.admission import Admission, Admitted
from aptserve_scheduler.api.headers import RequestHeaders
from aptserve_scheduler.api.wire import REASON_TO_PROTO, TIER_TO_PROTO, to_duration
from aptserve_scheduler.core.types import RequestId
from aptserve_scheduler.driver import Driver
from aptserve_scheduler.stream import Chunk, RequestStream, StreamEnd

_MAX_ABORT_IDS = 1000


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Generate, Abort, GetModel, CountTokens."""

    def __init__(self, driver: Driver, admission: Admission) -> None:
        self._driver = driver
        self._admission = admission

    async def Generate(  # noqa: N802 - the name of the RPC
        self, request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Started, TokenChunks, Finished."""
        structlog.contextvars.bind_contextvars(request_id=request.request_id[:128])
        headers = RequestHeaders.from_metadata(context.invocation_metadata() or ())
        admitted = await self._admission.admit(request, headers, self._longest_request)
        stream = admitted.stream
        structlog.contextvars.bind_contextvars(request_id=stream.request_id)
        if admitted.end is not None:
            yield _started(admitted)
            yield _finished(stream, admitted.end)
            return
        self._driver.submit(admitted.spec, stream)
        try:
            yield _started(admitted)
            while isinstance(event := await stream.next(), Chunk):
                yield _token_chunk(event)
            yield _finished(stream, event)
        finally:
            # Every way out: the end, an error, the client's cancel, its deadline.
            self._driver.leave(stream)

    async def Abort(  # noqa: N802
        self, request: inference_pb2.AbortRequest, context: grpc.ServicerContext
    ) -> inference_pb2.AbortResponse:
        """End requests by id."""
        if not 1 <= len(request.request_ids) <= _MAX_ABORT_IDS:
            raise InvalidArgumentError("request_ids", f"must have 1 to {_MAX_ABORT_IDS} entries")
        aborted = [i for i in request.request_ids if self._driver.abort(RequestId(i))]
        return inference_pb2.AbortResponse(aborted_request_ids=aborted)

    async def GetModel(  # noqa: N802
        self, request: inference_pb2.GetModelRequest, context: grpc.ServicerContext
    ) -> inference_pb2.GetModelResponse:
        """Describe the served model."""
        model = self._admission.find_model(request.model)
        tiers = {t.tier for w in self._driver.workers.values() for t in w.spec.tiers}
        return inference_pb2.GetModelResponse(
            model=model.name,
            architecture=model.architecture,
            context_length=model.context_length,
            vocab_size=model.vocab_size,
            eos_token_ids=sorted(model.eos_token_ids),
            has_tokenizer=model.codec is not None,
            tiers=[TIER_TO_PROTO[t] for t in sorted(tiers)],
        )

    async def CountTokens(  # noqa: N802
        self, request: inference_pb2.CountTokensRequest, context: grpc.ServicerContext
    ) -> inference_pb2.CountTokensResponse:
        """Count the tokens of a text as Generate would."""
        model = self._admission.find_model(request.model)
        token_ids = await self._admission.encode(request.text, model)
        return inference_pb2.CountTokensResponse(num_tokens=len(token_ids), token_ids=token_ids)

    def _longest_request(self) -> int | None:
        """Tokens, prompt and output, that the empty pool of the largest worker can hold."""
        workers = self._driver.snapshot().workers
        return max((worker.max_request_tokens for worker in workers), default=None)


def _started(admitted: Admitted) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(
        started=inference_pb2.Started(
            request_id=admitted.spec.request_id,
            model=admitted.model.name,
            num_prompt_tokens=admitted.stream.num_prompt_tokens,
        )
    )


def _token_chunk(chunk: Chunk) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(
        token_chunk=inference_pb2.TokenChunk(
            token_ids=chunk.token_ids, text=chunk.text, logprobs=chunk.logprobs
        )
    )


def _finished(stream: RequestStream, end: StreamEnd) -> inference_pb2.GenerateResponse:
    timing = inference_pb2.Timing(
        queued=to_duration(end.timing.queued_seconds),
        total=to_duration(end.timing.total_seconds),
        num_preemptions=end.timing.num_preemptions,
    )
    if end.timing.ttft_seconds is not None:
        timing.time_to_first_token.CopyFrom(to_duration(end.timing.ttft_seconds))
    if end.timing.tbt_p99_seconds is not None:
        timing.time_between_tokens_p99.CopyFrom(to_duration(end.timing.tbt_p99_seconds))
    return inference_pb2.GenerateResponse(
        finished=inference_pb2.Finished(
            finish_reason=REASON_TO_PROTO[end.reason],
            matched_stop_string=end.matched_stop_string or "",
            matched_stop_token_id=end.matched_stop_token_id,
            usage=inference_pb2.Usage(
                num_prompt_tokens=stream.num_prompt_tokens,
                num_output_tokens=stream.num_output_tokens,
            ),
            timing=timing,
        )
    )
