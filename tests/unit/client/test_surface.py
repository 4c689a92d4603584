"""Nothing of the API is missing from the SDK."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
import types as python_types
from typing import Any, get_type_hints

import aptserve
import pytest
from aptserve import _aio_streams, _streams, errors, types
from aptserve._request import SamplingOptions
from aptserve.sampling import SamplingParams
from aptserve.v1 import admin_pb2, inference_pb2, types_pb2

METHODS = {
    "Generate": "generate",
    "Abort": "abort",
    "GetModel": "get_model",
    "CountTokens": "count_tokens",
    "GetStatus": "status",
    "WatchPlans": "watch_plans",
    "Drain": "drain",
}


def _public(namespace: Any) -> set[str]:
    return {name for name in vars(namespace) if not name.startswith("_")}


def test_every_rpc_has_a_method_in_both_clients() -> None:
    rpcs = {
        method.name
        for module, service in ((inference_pb2, "InferenceService"), (admin_pb2, "AdminService"))
        for method in module.DESCRIPTOR.services_by_name[service].methods
    }
    assert rpcs == set(METHODS)
    for name in METHODS.values():
        assert callable(getattr(aptserve.Client, name))
        assert callable(getattr(aptserve.AsyncClient, name))


@pytest.mark.parametrize(
    ("sync", "asynchronous"),
    [
        (aptserve.Client, aptserve.AsyncClient),
        (aptserve.GenerateStream, aptserve.AsyncGenerateStream),
        (aptserve.PlanStream, aptserve.AsyncPlanStream),
    ],
)
def test_sync_and_async_have_the_same_surface(sync: type, asynchronous: type) -> None:
    assert _public(sync) == _public(asynchronous)
    for name in _public(sync):
        ours, theirs = getattr(sync, name), getattr(asynchronous, name)
        if inspect.isfunction(ours):
            assert inspect.signature(ours).parameters == inspect.signature(theirs).parameters, name


def test_every_public_name_is_exported() -> None:
    defined = {
        value.__name__
        for module in (errors, types, _streams, _aio_streams)
        for value in vars(module).values()
        if inspect.isclass(value)
        and value.__module__ == module.__name__
        and not value.__name__.startswith("_")
    }
    defined |= {"Client", "AsyncClient", "SamplingParams"}
    assert set(aptserve.__all__) == defined
    assert all(hasattr(aptserve, name) for name in aptserve.__all__)
    assert aptserve.__all__ == sorted(aptserve.__all__)


def test_every_public_thing_is_documented() -> None:
    for name in aptserve.__all__:
        value = getattr(aptserve, name)
        assert inspect.getdoc(value), name
        for member in _public(value):
            thing = vars(value)[member]
            if isinstance(thing, python_types.FunctionType | property):
                assert inspect.getdoc(thing), f"{name}.{member}"


def test_sampling_options_are_the_fields_of_sampling_params() -> None:
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert set(SamplingOptions.__annotations__) == fields
    assert get_type_hints(SamplingOptions).keys() == fields
    assert {field.name for field in types_pb2.SamplingParams.DESCRIPTOR.fields} == fields


def test_enums_match_the_protocol() -> None:
    for ours, theirs, prefix in (
        (types.FinishReason, types_pb2.FinishReason, "FINISH_REASON_"),
        (types.Tier, types_pb2.CacheTier, "CACHE_TIER_"),
    ):
        names = {name.removeprefix(prefix) for name in theirs.keys()} - {"UNSPECIFIED"}  # noqa: SIM118
        assert {member.name for member in ours} == names


def test_import_is_light() -> None:
    code = (
        "import sys, aptserve, aptserve.v1; heavy = {'numpy', 'typer', 'rich', 'torch', 'pydantic',"
        "'structlog', 'tokenizers', 'psutil', 'uvloop'} & set(sys.modules); sys.exit(str(heavy) if "
        "heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
