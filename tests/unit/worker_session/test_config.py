from __future__ import annotations

from typing import Any

import pytest
from aptserve_worker.config import SettingsError, load_settings
from aptserve_worker.fake import FakeModel
from aptserve_worker.plan import Tier


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("APTSERVE_WORKER_"):
            monkeypatch.delenv(name)


def test_defaults() -> None:
    settings = load_settings()
    assert settings.scheduler == "127.0.0.1:50051"
    assert settings.model == "embedded"
    assert settings.tiers is None
    assert settings.pool_units is None
    assert settings.pool_memory is None
    assert settings.worker_id != load_settings().worker_id


def test_environment_is_read_and_arguments_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APTSERVE_WORKER_TIERS", "kv, hidden")
    monkeypatch.setenv("APTSERVE_WORKER_POOL_MEMORY", "1.5 GiB")
    monkeypatch.setenv("APTSERVE_WORKER_BLOCK_SIZE", "8")
    monkeypatch.setenv("APTSERVE_WORKER_CALIBRATE", "false")
    monkeypatch.setenv("APTSERVE_WORKER_JOIN_TOKEN", "s3cret")
    settings = load_settings(block_size=32)
    assert settings.tiers == (Tier.KV, Tier.HIDDEN)
    assert settings.pool_memory == 3 * 2**29
    assert settings.block_size == 32
    assert settings.calibrate is False
    assert settings.join_token is not None
    assert settings.join_token.get_secret_value() == "s3cret"
    assert "s3cret" not in repr(settings)


@pytest.mark.parametrize(
    ("text", "value"), [("7", 7), ("2GiB", 2**31), ("500MB", 500_000_000), ("1.5kib", 1536)]
)
def test_bytes_are_parsed(text: str, value: int) -> None:
    assert load_settings(pool_memory=text).pool_memory == value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_size": 0}, "block_size=0: Input should be greater than or equal to 1"),
        ({"pool_memory": "2 apples"}, "pool_memory='2 apples': must be a number of bytes"),
        ({"pool_memory": "-1"}, "pool_memory='-1': must be a number of bytes"),
        ({"pool_units": 4, "pool_memory": "1GiB"}, "pool_memory=1073741824: pool_units is given"),
        ({"tiers": "kv,huge"}, "tiers='kv,huge': each must be one of kv, hidden"),
        ({"tiers": "hidden"}, "tiers: kv must be among them"),
        ({"tiers": "kv,kv"}, "tiers: each may be named once"),
        ({"dtype": "int4"}, "dtype='int4': Input should be 'auto', 'float32'"),
        ({"overlap": "maybe"}, "overlap='maybe': Input should be 'auto', 'off' or 'on'"),
        ({"max_num_seqs": "many"}, "max_num_seqs='many': Input should be a valid integer"),
        ({"no_such": 1}, "no_such=1: Extra inputs are not permitted"),
        ({"worker_id": ""}, "worker_id='': String should have at least 1 character"),
    ],
)
def test_wrong_value_gives_one_line_with_field_and_value(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(**values)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_wrong_token_is_not_shown() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(join_token=12345)
    assert "12345" not in str(caught.value)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().block_size = 4  # type: ignore[misc]


def test_fake_model_follows_the_settings() -> None:
    model = FakeModel.from_settings(
        load_settings(
            model="fake",
            model_name="tiny",
            tiers="kv",
            block_size=4,
            pool_memory=40960,
            max_num_seqs=3,
            max_num_batched_tokens=5,
        )
    )
    info = model.info()
    assert (info.model_name, info.block_size, info.num_units) == ("tiny", 4, 10)
    assert [tier.tier for tier in info.tiers] == [Tier.KV]
    assert (info.max_num_seqs, info.max_num_batched_tokens) == (3, 5)
    assert FakeModel.from_settings(load_settings(pool_units=7)).num_units == 7
