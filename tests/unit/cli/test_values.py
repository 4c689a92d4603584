"""What people type, read."""

import pytest
from aptserve.cli.values import (
    dial_address,
    format_bytes,
    format_seconds,
    join_address,
    parse_seconds,
    split_address,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("1.5s", 1.5), ("2m", 120), ("30", 30), (" 1 h ", 3600), (".5s", 0.5)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1 day", "1e3", "nan", "1s2s"])
def test_wrong_durations_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("127.0.0.1:0", "127.0.0.1", 0), ("localhost:65535", "localhost", 65535), ("[::]:1", "::", 1)],
)
def test_addresses_split_and_join(address: str, host: str, port: int) -> None:
    assert split_address(address) == (host, port)
    assert join_address(host, port) == address


@pytest.mark.parametrize("address", ["", "host", ":1", "host:", "host:65536", "::1:50051", "a b:1"])
def test_wrong_addresses_are_refused(address: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        split_address(address)


@pytest.mark.parametrize(
    ("listen", "dialled"),
    [
        ("0.0.0.0:1", "127.0.0.1:1"),
        ("[::]:1", "[::1]:1"),
        ("127.0.0.1:1", "127.0.0.1:1"),
        ("example:1", "example:1"),
    ],
)
def test_a_wildcard_is_dialled_on_loopback(listen: str, dialled: str) -> None:
    assert dial_address(listen) == dialled


def test_quantities_read_well() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 2**30, 2**41)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "1.0 GiB",
        "2.0 TiB",
    ]
    assert [format_seconds(s) for s in (0.0123, 1.25, 75, 3700)] == [
        "12.3 ms",
        "1.2 s",
        "1 min 15 s",
        "1 h 1 min",
    ]
