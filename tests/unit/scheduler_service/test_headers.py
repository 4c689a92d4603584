"""Metadata of a call becomes fields of its request."""

from __future__ import annotations

import pytest
from aptserve.errors import InvalidArgumentError
from aptserve_scheduler.api.headers import TBT_KEY, TENANT_KEY, TTFT_KEY, RequestHeaders


def test_what_gateways_say_is_read_and_the_rest_is_not() -> None:
    metadata = [
        (TTFT_KEY, "250"),
        ("user-agent", "x"),
        (TBT_KEY, " 12.5 "),
        (TENANT_KEY, "team a"),
        ("x-llm-d-inference-objective", "critical"),
    ]
    assert RequestHeaders.from_metadata(metadata) == RequestHeaders(0.25, 0.0125, "team a")
    assert RequestHeaders.from_metadata([]) == RequestHeaders()


@pytest.mark.parametrize("key", [TTFT_KEY, TBT_KEY])
@pytest.mark.parametrize(
    "value", ["", "0", "0.0", "-1", "nan", "inf", "1e3", "1_0", "5ms", "1,2", "٣", "9" * 13, "."]
)
def test_a_time_that_is_none_names_its_key(key: str, value: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        RequestHeaders.from_metadata([(key, value)])
    assert caught.value.field == key


@pytest.mark.parametrize("value", ["x" * 129, "a\nb", b"a"])
def test_a_tenant_that_is_none_names_its_key(value: str | bytes) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        RequestHeaders.from_metadata([(TENANT_KEY, value)])
    assert caught.value.field == TENANT_KEY


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="more than once"):
        RequestHeaders.from_metadata([(TENANT_KEY, "a"), (TENANT_KEY, "a")])
