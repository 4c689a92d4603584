"""From a GenerateRequest to a request of the core: every check, in one order."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aptserve.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from aptserve.hints import Hints
from aptserve.sampling import (
    DEFAULT_MAX_TOKENS,
    MAX_LOGIT_BIAS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)
from aptserve.v1 import inference_pb2, types_pb2
from google.protobuf import duration_pb2

from aptserve_scheduler.api.headers import RequestHeaders
from aptserve_scheduler.api.wire import check_id
from aptserve_scheduler.core.types import (
    FinishReason,
    Objectives,
    RequestId,
    RequestSpec,
    RequestTiming,
)
from aptserve_scheduler.model import ModelSlot, ServedModel
from aptserve_scheduler.stream import RequestStream, StreamEnd
from aptserve_scheduler.text.encoder import PromptThread
from aptserve_scheduler.text.output import OutputText, TextDelta
from aptserve_scheduler.text.tokenizer import TextCodec

MAX_TEXT_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that can be served. ``end`` is set when its resumed output is complete already."""

    model: ServedModel
    spec: RequestSpec
    stream: RequestStream
    end: StreamEnd | None = None


class Admission:
    """Checks requests and prepares them for the core."""

    def __init__(
        self,
        models: ModelSlot,
        thread: PromptThread,
        defaults: Objectives,
        is_accepting: Callable[[], bool],
    ) -> None:
        """``is_accepting``: whether a worker is attached and the service is not draining."""
        self._models = models
        self._thread = thread
        self._defaults = defaults
        self._is_accepting = is_accepting

    async def admit(
        self,
        request: inference_pb2.GenerateRequest,
        headers: RequestHeaders,
        longest_request: Callable[[], int | None],
    ) -> Admitted:
        """Check everything and tokenise. Raises errors that name the field by its path.

        ``longest_request``: most tokens, prompt and output, that any worker can hold; ``None``
        without a worker.
        """
        arrival = time.monotonic()
        self.check_accepting()
        model = self.find_model(request.model)
        request_id = _request_id(request.request_id)
        objectives = self._objectives(request.objectives, headers)
        hints = _hints(request, headers)
        _check_lengths(request.sampling)
        params = SamplingParams.from_proto(request.sampling)
        params.validate(vocab_size=model.vocab_size)
        if params.stop_strings:
            require_codec(model)
        resumed = _check_tokens("resume_token_ids", request.resume_token_ids, model)
        prompt = await self._prompt(request, model)
        limit = DEFAULT_MAX_TOKENS
        if params.max_tokens is None and (longest := longest_request()) is not None:
            # A length that nobody asked for is cut to the memory; what does not fit even then, or
            # was asked for, is for the core to refuse.
            limit = min(limit, max(longest - len(prompt), len(resumed), 1))
        max_tokens = _max_tokens(params, model.context_length - len(prompt) + 1, limit)
        if len(resumed) > max_tokens:
            raise InvalidArgumentError(
                "resume_token_ids", f"{len(resumed)} tokens are more than max_tokens, {max_tokens}"
            )
        spec = RequestSpec(
            request_id=request_id,
            prompt_token_ids=prompt,
            max_tokens=max_tokens,
            objectives=objectives,
            sampling=_complete(request.sampling, max_tokens),
            resume_token_ids=resumed,
            tenant=hints.tenant,
            priority=hints.priority,
            expected_output_tokens=_at_most(hints.expected_output_tokens, max_tokens),
        )
        output_text, replayed = await self._replay(model.codec, spec, params)
        stream = RequestStream(
            request_id,
            num_prompt_tokens=len(prompt),
            num_resumed_tokens=replayed.num_tokens,
            output_text=output_text,
            arrival=arrival,
        )
        if self.find_model(request.model) is not model:
            raise UnavailableError("the served model has just changed")
        self.check_accepting()  # again: tokenising took its time
        return Admitted(model, spec, stream, _earlier_end(model, spec, params, replayed))

    def check_accepting(self) -> None:
        """Raise :class:`UnavailableError` where no request can be taken."""
        if not self._is_accepting():
            raise UnavailableError("no worker is attached, or the service is draining")

    def find_model(self, name: str) -> ServedModel:
        """The model called ``name``; empty: the served one."""
        model = self._models.current
        if model is None:
            raise UnavailableError("no worker has attached yet")
        if name not in ("", model.name):
            raise NotFoundError(f"model {name!r} is not served here; {model.name!r} is")
        return model

    async def encode(self, text: str, model: ServedModel) -> list[int]:
        """Tokens of a text as Generate uses them."""
        num_bytes = len(text.encode())
        if num_bytes > MAX_TEXT_BYTES:
            raise InvalidArgumentError("text", f"has {num_bytes} bytes, at most {MAX_TEXT_BYTES}")
        codec = require_codec(model)
        return await self._thread.run(lambda: codec.encode(text))

    async def _prompt(
        self, request: inference_pb2.GenerateRequest, model: ServedModel
    ) -> Sequence[int]:
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise InvalidArgumentError("prompt", "text or token_ids is required")
        tokens: Sequence[int]
        if kind == "text":
            field = "text"
            if not request.text:
                raise InvalidArgumentError(field, "must have at least one character")
            tokens = await self.encode(request.text, model)
        else:
            field = "token_ids.ids"
            tokens = _check_tokens(field, request.token_ids.ids, model)
        if not 1 <= len(tokens) <= model.context_length:
            raise InvalidArgumentError(
                field, f"has {len(tokens)} tokens, must have 1 to {model.context_length}"
            )
        return tokens

    def _objectives(self, message: inference_pb2.Objectives, headers: RequestHeaders) -> Objectives:
        """The message's, else the metadata's, else the service's."""
        return Objectives(
            ttft_seconds=_seconds(
                message, "ttft", headers.ttft_seconds or self._defaults.ttft_seconds
            ),
            tbt_seconds=_seconds(message, "tbt", headers.tbt_seconds or self._defaults.tbt_seconds),
        )

    async def _replay(
        self, codec: TextCodec | None, spec: RequestSpec, params: SamplingParams
    ) -> tuple[OutputText | None, TextDelta]:
        """The text state after the resumed tokens; the client has their text already."""
        resumed = spec.resume_token_ids
        if codec is None:
            return None, TextDelta("", len(resumed))
        output_text = OutputText(codec.decode, spec.prompt_token_ids, params.stop_strings)
        if not resumed:
            return output_text, TextDelta("", 0)
        return output_text, await self._thread.run(lambda: output_text.push(resumed))


def require_codec(model: ServedModel) -> TextCodec:
    """The tokenizer, or :class:`FailedPreconditionError`."""
    if model.codec is None:
        raise FailedPreconditionError(f"model {model.name!r} has no tokenizer: send token_ids")
    return model.codec


def _request_id(given: str) -> RequestId:
    if not given:
        return RequestId(uuid.uuid4().hex)
    check_id("request_id", given)
    return RequestId(given)


def _check_lengths(sampling: types_pb2.SamplingParams) -> None:
    """Before anything walks through lists that may have millions of entries."""
    for name, most in (
        ("logit_bias", MAX_LOGIT_BIAS),
        ("stop_token_ids", MAX_STOP_TOKEN_IDS),
        ("stop_strings", MAX_STOP_STRINGS),
    ):
        if len(getattr(sampling, name)) > most:
            raise InvalidArgumentError(f"sampling.{name}", f"at most {most} entries")


def _check_tokens(field: str, token_ids: Sequence[int], model: ServedModel) -> tuple[int, ...]:
    if len(token_ids) > model.context_length:
        raise InvalidArgumentError(
            field, f"has {len(token_ids)} tokens, the context {model.context_length}"
        )
    if token_ids and max(token_ids) >= model.vocab_size:
        wrong = next(t for t in token_ids if t >= model.vocab_size)
        raise InvalidArgumentError(field, f"token {wrong} is not in [0, {model.vocab_size})")
    return tuple(token_ids)


def _seconds(message: inference_pb2.Objectives, name: str, default: float) -> float:
    if not message.HasField(name):  # type: ignore[arg-type]
        return default
    duration: duration_pb2.Duration = getattr(message, name)
    seconds = duration.seconds + duration.nanos * 1e-9
    if not seconds > 0:
        raise InvalidArgumentError(f"objectives.{name}", "must be more than 0")
    return seconds


def _hints(request: inference_pb2.GenerateRequest, headers: RequestHeaders) -> Hints:
    has_guess = request.HasField("expected_output_tokens")
    hints = Hints(
        tenant=request.tenant or headers.tenant,
        priority=request.priority,
        expected_output_tokens=request.expected_output_tokens if has_guess else None,
    )
    hints.validate()
    return hints


def _at_most(guess: int | None, limit: int) -> int | None:
    return None if guess is None else min(guess, limit)


def _max_tokens(params: SamplingParams, room: int, default: int) -> int:
    """Output tokens allowed; the last one need not fit, as it is never fed back."""
    if params.max_tokens is not None and params.max_tokens > room:
        raise InvalidArgumentError(
            "sampling.max_tokens", f"is {params.max_tokens}, but the context leaves {room}"
        )
    max_tokens = params.max_tokens or min(default, room)
    if params.min_tokens > max_tokens:
        raise InvalidArgumentError("sampling.min_tokens", f"must be in [0, {max_tokens}]")
    return max_tokens


def _complete(message: types_pb2.SamplingParams, max_tokens: int) -> types_pb2.SamplingParams:
    """The parameters for a worker: a seed drawn here survives preemption and a lost worker."""
    sampling = types_pb2.SamplingParams()
    sampling.CopyFrom(message)
    sampling.max_tokens = max_tokens
    if not sampling.HasField("seed"):
        sampling.seed = secrets.randbits(64)
    sampling.ClearField("stop_strings")
    return sampling


def _earlier_end(
    model: ServedModel, spec: RequestSpec, params: SamplingParams, replayed: TextDelta
) -> StreamEnd | None:
    """How the resumed output ended, if only the end of its stream was lost."""
    timing = RequestTiming(0.0, None, None, 0.0, 0.0, 0, objectives_met=True)
    if replayed.matched_stop_string is not None:
        return StreamEnd(FinishReason.STOP, timing, replayed.matched_stop_string)
    resumed = spec.resume_token_ids
    if not resumed:
        return None
    stop_token_ids = set(params.stop_token_ids)
    if not params.ignore_eos:
        stop_token_ids |= model.eos_token_ids
    if resumed[-1] in stop_token_ids and len(resumed) > params.min_tokens:
        return StreamEnd(FinishReason.STOP, timing, matched_stop_token_id=resumed[-1])
    if len(resumed) == spec.max_tokens:
        return StreamEnd(FinishReason.LENGTH, timing)
    return None
