"""Settings: one line that names field and value."""

from __future__ import annotations

from typing import Any

import pytest
from aptserve_scheduler.config import ConfigError, load_settings, split_address
from pydantic import ValidationError


def test_the_defaults_listen_on_loopback_alone() -> None:
    settings = load_settings()
    assert settings.listen == "127.0.0.1:50051"
    assert settings.metrics_listen is None


def test_the_environment_gives_settings_and_arguments_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APTSERVE_SCHEDULER_LISTEN", "127.0.0.1:1")
    monkeypatch.setenv("APTSERVE_SCHEDULER_PIPELINE_DEPTH", "1")
    settings = load_settings(listen="127.0.0.1:2", policy=None)
    assert settings.listen == "127.0.0.1:2"
    assert settings.pipeline_depth == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("listen", "localhost"),
        ("listen", "localhost:http"),
        ("listen", "localhost:70000"),
        ("metrics_listen", ":9000"),
        ("policy", "best"),
        ("pipeline_depth", 0),
        ("max_waiting", 0),
        ("stall_seconds", float("nan")),
        ("ttft_objective_seconds", 0.0),
        ("drain_grace_seconds", -1.0),
        ("drain_grace_seconds", float("nan")),
        ("log_level", "loud"),
    ],
)
def test_a_wrong_value_gives_one_line_with_field_and_value(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} = {value!r}: ")
    assert "\n" not in message


def test_a_secret_is_in_no_message() -> None:
    settings = load_settings(api_key="hunter2", join_token="hunter3")
    assert "hunter" not in repr(settings)
    with pytest.raises(ConfigError) as caught:
        load_settings(api_key=12345)
    assert "12345" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"join_token: must not be empty"):
        load_settings(join_token="")


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        load_settings().listen = "127.0.0.1:1"


def test_addresses_may_be_ipv6() -> None:
    assert split_address("[::1]:80") == ("::1", 80)
    assert split_address("localhost:0") == ("localhost", 0)
