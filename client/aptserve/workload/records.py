"""Rows of CSV and JSON-lines files: checked values, and errors that say where they stand."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TextIO, TypeVar

_MAX_TOKENS = 2**31 - 1
_T = TypeVar("_T")


class TraceFormatError(ValueError):
    """A file that cannot be read as a trace; one line with file, line and column."""

    def __init__(
        self, path: Path, reason: str, *, line: int | None = None, column: str | None = None
    ) -> None:
        at_line = f", line {line}" if line is not None else ""
        at_column = f", column {column}" if column is not None else ""
        super().__init__(f"{path}{at_line}{at_column}: {reason}")


@dataclass(slots=True)
class Record:
    """One row: values by column, text from CSV and anything from JSON."""

    path: Path
    line: int
    values: Mapping[str, object]

    def get(self, column: str, parse: Callable[[object], _T]) -> _T:
        """A value; what ``parse`` says in a ValueError becomes a :class:`TraceFormatError`."""
        try:
            return parse(self.values[column])
        except KeyError:
            raise self.error("is missing", column) from None
        except ValueError as error:
            raise self.error(str(error), column) from None

    def error(self, reason: str, column: str | None = None) -> TraceFormatError:
        """An error at this row."""
        return TraceFormatError(self.path, reason, line=self.line, column=column)


def tokens(value: object) -> int:
    """A number of tokens, 0 to 2^31 - 1, from text or a JSON number."""
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            raise ValueError(f"{value!r} is not a number of tokens") from None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_TOKENS:
        raise ValueError(f"{value!r} is not a number of tokens")
    return value


def number(value: object) -> float:
    """A finite number from text or a JSON number."""
    try:
        result = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        raise ValueError(f"{value!r} is not a number")
    return result


def milliseconds(value: object) -> float:
    """Seconds from a number of milliseconds."""
    return number(value) / 1000


def date_time(value: object) -> float:
    """Seconds since 1970 from an ISO date and time; one without a zone is taken as UTC.

    Digits after the microseconds (Azure writes seven) are ignored.
    """
    try:
        when = datetime.fromisoformat(str(value))
    except ValueError:
        raise ValueError(f"{value!r} is not a date and time") from None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def first_line(path: Path) -> str:
    """The first line that is not blank; :class:`TraceFormatError` when there is none."""
    with _open_text(path) as file:
        for line in file:
            if line.strip():
                return line
    raise TraceFormatError(path, "is empty")


def csv_columns(path: Path) -> list[str]:
    """Names of the columns in the header, the first line."""
    try:
        return [name.strip() for name in next(csv.reader([first_line(path)]))]
    except csv.Error as error:
        raise TraceFormatError(path, f"has no CSV header ({error})") from None


def csv_records(path: Path) -> Iterator[Record]:
    """The rows under the header; blank lines are skipped."""
    columns = csv_columns(path)
    for line, row in islice(_filled_rows(path), 1, None):
        if len(row) != len(columns):
            reason = f"has {len(row)} columns where the header has {len(columns)}"
            raise TraceFormatError(path, reason, line=line)
        yield Record(path, line, dict(zip(columns, row, strict=True)))


def json_records(path: Path) -> Iterator[Record]:
    """The objects of a file with one on each line; blank lines are skipped."""
    with _open_text(path) as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                values = json.loads(text)
            except ValueError as error:
                raise TraceFormatError(path, f"is not JSON ({error})", line=line) from None
            if not isinstance(values, dict):
                raise TraceFormatError(path, "is not a JSON object", line=line)
            yield Record(path, line, values)


def _filled_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    with _open_text(path) as file:
        reader = csv.reader(file)
        try:
            yield from ((reader.line_num, row) for row in reader if any(row))
        except csv.Error as error:
            raise TraceFormatError(path, str(error), line=reader.line_num) from None


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise TraceFormatError(path, f"is not UTF-8 text ({error.reason})") from None
