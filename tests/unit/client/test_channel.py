from __future__ import annotations

import json

import pytest
from aptserve import AsyncClient, Client, InvalidArgumentError
from aptserve._channel import DEFAULT_ADDRESS, SERVICE_CONFIG, make_target


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APTSERVE_ADDRESS", raising=False)
    monkeypatch.delenv("APTSERVE_API_KEY", raising=False)


def test_arguments_win_over_environment_and_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_target(None, None, None, ()).address == DEFAULT_ADDRESS
    assert make_target(None, None, None, ()).metadata == ()
    monkeypatch.setenv("APTSERVE_ADDRESS", "there:1")
    monkeypatch.setenv("APTSERVE_API_KEY", "key")
    target = make_target(None, None, None, ())
    assert target.address == "there:1"
    assert target.metadata == (("authorization", "Bearer key"),)
    target = make_target("here:2", "mine", None, [("grpc.keepalive_time_ms", 1)])
    assert target.address == "here:2"
    assert target.metadata == (("authorization", "Bearer mine"),)
    assert dict(target.options)["grpc.keepalive_time_ms"] == 1


def test_channel_is_bounded_and_retries_only_unavailable() -> None:
    options = dict(make_target(None, None, None, ()).options)
    assert 0 < options["grpc.max_receive_message_length"] <= 64 << 20
    assert 0 < options["grpc.max_send_message_length"] <= 64 << 20
    for timeout in ("grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms"):
        milliseconds = options["grpc.keepalive_time_ms"] + options[timeout]
        assert milliseconds < 10_000, "a silent service is noticed within 10 s"
    (config,) = json.loads(SERVICE_CONFIG)["methodConfig"]
    assert config["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]
    assert config["retryPolicy"]["maxAttempts"] <= 5


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("field", ["timeout", "resume_timeout"])
@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_times_must_be_finite(
    kind: type[Client] | type[AsyncClient], field: str, seconds: float
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        kind(**{field: seconds})  # type: ignore[arg-type]
    assert caught.value.field == field


def test_async_client_may_be_made_outside_an_event_loop() -> None:
    assert AsyncClient("there:1").address == "there:1"
