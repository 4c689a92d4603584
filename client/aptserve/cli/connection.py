"""A client whose failures to connect read well at a terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from enum import Enum
from typing import Any

from aptserve import Client, UnavailableError
from aptserve.cli.problems import CommandError


@contextlib.contextmanager
def connected(address: str, api_key: str | None) -> Iterator[Client]:
    """A client of the service at ``address``; :class:`CommandError` when nothing is there."""
    try:
        # A person sees a broken stream and can ask again; resuming in silence would look stuck.
        with Client(address, api_key=api_key, resume=False) as client:
            yield client
    except UnavailableError as error:
        if "connect" not in error.message.lower():
            raise
        raise CommandError(
            f"no service answers at {address}; start one with: aptserve up"
        ) from error


def to_json(value: Any, indent: int | None = None) -> str:
    """A value of the SDK as JSON; an enum is its value, a missing one null."""
    return json.dumps(dataclasses.asdict(value), default=_enum_value, indent=indent)


def _enum_value(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"{type(value).__name__} has no JSON form")
