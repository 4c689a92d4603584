"""Reads what people type: addresses and durations."""

from __future__ import annotations

import re

_SECONDS = {"ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_seconds(text: str) -> float:
    """Seconds that ``"500ms"``, ``"1.5s"``, ``"2m"`` or ``"30"`` means. Raises ``ValueError``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", text)
    if match is None or match[2] not in _SECONDS:
        raise ValueError(f"{text!r} is no duration such as 500ms, 1.5s or 2m")
    return float(match[1]) * _SECONDS[match[2]]


def split_address(text: str) -> tuple[str, int]:
    """Host and port of ``"127.0.0.1:50051"`` or ``"[::1]:50051"``. Raises ``ValueError``."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]]+):(\d{1,5})", text)
    if match is None or int(match[2]) > 65535:
        raise ValueError(f"{text!r} is no HOST:PORT such as 127.0.0.1:50051")
    return match[1].strip("[]"), int(match[2])


def join_address(host: str, port: int) -> str:
    """``HOST:PORT``, with the brackets that an IPv6 host needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def dial_address(listen: str) -> str:
    """Where a client on this machine reaches a service that listens there."""
    host, port = split_address(listen)
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return join_address(reachable, port)


def format_bytes(count: float) -> str:
    """``1536`` as ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """``0.0123`` as ``12.3 ms``, ``75`` as ``1 min 15 s``."""
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
