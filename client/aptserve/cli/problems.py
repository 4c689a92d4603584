"""Failures that a person at a terminal should read as one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_Settings = TypeVar("_Settings")


class CommandError(Exception):
    """Ends a command with one line on standard error and an exit code."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def usage_error(message: str) -> CommandError:
    """The error of a flag or value that cannot be used."""
    return CommandError(message, EXIT_USAGE)


def settings_from_flags(
    load: Callable[..., _Settings],
    error_type: type[Exception],
    flags: Mapping[str, object],
    renamed: Mapping[str, str],
) -> _Settings:
    """The settings that flags, environment and defaults give together.

    ``flags`` are field values, ``None`` where the flag was not given. The loader's error names a
    field; the :class:`CommandError` raised here names the flag: ``renamed`` has those that are not
    simply the field's name.
    """
    try:
        return load(**given(flags))
    except error_type as error:
        message = re.sub(
            r"\A(\w+) ?=? ?",
            lambda match: renamed.get(match[1], f"--{match[1].replace('_', '-')}") + " ",
            str(error),
            count=1,
        )
        raise usage_error(message.replace(" :", ":", 1)) from None


def given(flags: Mapping[str, object]) -> dict[str, object]:
    """The flags that were given."""
    return {name: value for name, value in flags.items() if value is not None}
