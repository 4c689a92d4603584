"""From a caller's arguments to a GenerateRequest, checked before anything is sent."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import TypedDict

from aptserve import _wire
from aptserve.errors import InvalidArgumentError
from aptserve.hints import Hints
from aptserve.sampling import SamplingParams
from aptserve.types import Objectives
from aptserve.v1 import inference_pb2

MAX_TEXT_BYTES = 4 << 20
MAX_REQUEST_ID_LENGTH = 128


class SamplingOptions(TypedDict, total=False):
    """Fields of :class:`SamplingParams` as keyword arguments."""

    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    logprobs: int | None
    stop_token_ids: Sequence[int]
    stop_strings: Sequence[str]
    ignore_eos: bool


def build_request(
    prompt: str | None,
    *,
    token_ids: Sequence[int] | None,
    sampling: SamplingParams | None,
    options: SamplingOptions,
    objectives: Objectives | None,
    request_id: str | None,
    model: str | None,
    resume_token_ids: Sequence[int] | None,
    hints: Hints,
) -> inference_pb2.GenerateRequest:
    """The message. Raises :class:`InvalidArgumentError` as the service would."""
    params = _sampling(sampling, options)
    params.validate()
    if objectives is not None:
        objectives.validate()
    hints.validate()
    request = inference_pb2.GenerateRequest(
        tenant=hints.tenant,
        priority=hints.priority,
        expected_output_tokens=hints.expected_output_tokens,
    )
    _set_prompt(request, prompt, token_ids)
    if request_id is not None:
        if not 1 <= len(request_id) <= MAX_REQUEST_ID_LENGTH:
            raise InvalidArgumentError(
                "request_id", f"must have 1 to {MAX_REQUEST_ID_LENGTH} characters"
            )
        request.request_id = request_id
    if model is not None:
        request.model = model
    try:
        request.sampling.CopyFrom(params.to_proto())
    except (ValueError, UnicodeError) as error:  # out of the field's type, such as 2**40 tokens
        raise InvalidArgumentError("sampling", str(error)) from error
    if objectives is not None:
        request.objectives.CopyFrom(_wire.objectives_to_proto(objectives))
    _extend("resume_token_ids", request.resume_token_ids, resume_token_ids or ())
    return request


def check_text(field: str, text: str) -> None:
    """Raise :class:`InvalidArgumentError` for text that the service would refuse."""
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(field, "is not valid Unicode") from error
    if num_bytes > MAX_TEXT_BYTES:
        raise InvalidArgumentError(field, f"has {num_bytes} bytes, at most {MAX_TEXT_BYTES}")


def _sampling(sampling: SamplingParams | None, options: SamplingOptions) -> SamplingParams:
    """A drawn seed is drawn here: a stream resumed on another scheduler must keep it."""
    if sampling is not None and options:
        raise TypeError(f"sampling is given, and so is {next(iter(options))}")
    params = sampling if sampling is not None else SamplingParams(**options)
    if params.seed is None and params.temperature > 0:
        params = dataclasses.replace(params, seed=secrets.randbits(64))
    return params


def _set_prompt(
    request: inference_pb2.GenerateRequest, prompt: str | None, token_ids: Sequence[int] | None
) -> None:
    if (prompt is None) == (token_ids is None):
        raise InvalidArgumentError("prompt", "exactly one of prompt and token_ids is required")
    if prompt is not None:
        if not prompt:
            raise InvalidArgumentError("text", "must have at least one character")
        check_text("text", prompt)
        request.text = prompt
        return
    assert token_ids is not None
    if len(token_ids) == 0:
        raise InvalidArgumentError("token_ids.ids", "must have at least one token")
    _extend("token_ids.ids", request.token_ids.ids, token_ids)


def _extend(field: str, values: object, token_ids: Sequence[int]) -> None:
    try:
        values.extend(token_ids)  # type: ignore[attr-defined]
    except ValueError as error:  # not a uint32
        raise InvalidArgumentError(field, str(error)) from error
