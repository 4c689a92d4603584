from __future__ import annotations

from typing import Any

import pytest
from aptserve import InvalidArgumentError, Objectives, SamplingParams
from aptserve._request import MAX_TEXT_BYTES, build_request
from aptserve.hints import Hints
from aptserve.v1 import inference_pb2


def build(prompt: str | None = "prompt", **fields: Any) -> inference_pb2.GenerateRequest:
    names = (
        "token_ids",
        "sampling",
        "objectives",
        "request_id",
        "model",
        "resume_token_ids",
    )
    arguments: dict[str, Any] = {name: fields.pop(name, None) for name in names}
    arguments["hints"] = fields.pop("hints", Hints())
    return build_request(prompt, options=fields, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": None}, "prompt"),
        ({"token_ids": [1]}, "prompt"),
        ({"prompt": ""}, "text"),
        ({"prompt": "x" * (MAX_TEXT_BYTES + 1)}, "text"),
        ({"prompt": "\ud800"}, "text"),
        ({"prompt": None, "token_ids": []}, "token_ids.ids"),
        ({"prompt": None, "token_ids": [-1]}, "token_ids.ids"),
        ({"prompt": None, "token_ids": [2**32]}, "token_ids.ids"),
        ({"resume_token_ids": [-1]}, "resume_token_ids"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"max_tokens": 0}, "sampling.max_tokens"),
        ({"max_tokens": 2**40}, "sampling"),
        ({"temperature": float("nan")}, "sampling.temperature"),
        ({"temperature": -1.0}, "sampling.temperature"),
        ({"stop_strings": ["\ud800"]}, "sampling"),
        ({"sampling": SamplingParams(top_p=0.0)}, "sampling.top_p"),
        ({"objectives": Objectives(ttft_seconds=0)}, "objectives.ttft"),
        ({"objectives": Objectives(tbt_seconds=float("inf"))}, "objectives.tbt"),
        ({"hints": Hints(tenant="x" * 129)}, "tenant"),
        ({"hints": Hints(tenant="a\nb")}, "tenant"),
        ({"hints": Hints(tenant="\ud800")}, "tenant"),
        ({"hints": Hints(priority=101)}, "priority"),
        ({"hints": Hints(priority=-101)}, "priority"),
        ({"hints": Hints(expected_output_tokens=0)}, "expected_output_tokens"),
        ({"hints": Hints(expected_output_tokens=2**32)}, "expected_output_tokens"),
    ],
)
def test_wrong_arguments_are_refused_before_sending(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        build(**fields)
    assert caught.value.field == field


def test_sampling_twice_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="min_p"):
        build(sampling=SamplingParams(), min_p=0.5)
    with pytest.raises(TypeError, match="no_such"):
        build(no_such=1)


def test_only_what_was_given_is_set() -> None:
    request = build()
    assert request.text == "prompt"
    assert {field.name for field, _ in request.ListFields()} == {"text", "sampling"}
    assert not request.sampling.HasField("seed")
    assert not request.sampling.HasField("max_tokens")


def test_seed_is_drawn_only_where_it_matters() -> None:
    seeds = {build(temperature=1.0).sampling.seed for _ in range(3)}
    assert len(seeds) == 3
    assert build(temperature=1.0, seed=0).sampling.seed == 0


def test_partial_objectives() -> None:
    objectives = build(objectives=Objectives(tbt_seconds=1.25)).objectives
    assert not objectives.HasField("ttft")
    assert (objectives.tbt.seconds, objectives.tbt.nanos) == (1, 250_000_000)


def test_hints() -> None:
    request = build(hints=Hints("team", -100, 7))
    assert (request.tenant, request.priority) == ("team", -100)
    assert request.expected_output_tokens == 7


def test_text_of_the_largest_size_passes() -> None:
    assert len(build("é" * (MAX_TEXT_BYTES // 2)).text) == MAX_TEXT_BYTES // 2
