"""Every error crosses the wire and comes back as the same class."""

from __future__ import annotations

import inspect
from typing import Any

import grpc
import pytest
from aptserve import errors
from aptserve.errors import AptServeError, from_rpc_error, to_status

EXAMPLES: list[AptServeError] = [
    errors.InvalidArgumentError("sampling.top_k", "must be whole"),
    errors.ResourceExhaustedError("full", 2.5),
    errors.ResourceExhaustedError("full"),
    *(
        kind("why")
        for kind in vars(errors).values()
        if inspect.isclass(kind)
        and issubclass(kind, AptServeError)
        and kind not in (AptServeError, errors.InvalidArgumentError, errors.ResourceExhaustedError)
    ),
]


class _Failed(grpc.RpcError):  # type: ignore[misc]
    """A failed call, as a channel would raise it."""

    def __init__(self, code: grpc.StatusCode, details: str, metadata: Any = ()) -> None:
        super().__init__()
        self._status = (code, details, metadata)

    def code(self) -> grpc.StatusCode:
        return self._status[0]

    def details(self) -> str:
        return self._status[1]

    def trailing_metadata(self) -> Any:
        return self._status[2]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_round_trip(error: AptServeError) -> None:
    status = to_status(error)
    assert status.code is error.code
    back = from_rpc_error(_Failed(status.code, status.details, status.trailing_metadata))
    assert type(back) is type(error)
    assert vars(back) == vars(error)


def test_codes_and_reasons_are_distinct() -> None:
    kinds = {type(error) for error in EXAMPLES}
    assert len({kind.code for kind in kinds}) == len(kinds)
    assert len({kind.reason for kind in kinds}) == len(kinds)


@pytest.mark.parametrize("code", list(grpc.StatusCode), ids=lambda code: code.name)
def test_status_of_a_stranger_maps_by_its_code(code: grpc.StatusCode) -> None:
    error = from_rpc_error(_Failed(code, "from a proxy"))
    if type(error) is not AptServeError:
        assert error.code is code
    assert "from a proxy" in error.message
