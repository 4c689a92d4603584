"""Readers of published traces, told apart by what is in the file.

CSV by header: ``arrival_s,input_tokens,output_tokens`` (or without arrivals), Azure 2023 and 2024
(``TIMESTAMP,ContextTokens,GeneratedTokens``), BurstGPT (``Timestamp,...,Request tokens,Response
tokens,...``). JSON lines by key: Mooncake (``timestamp`` or ``timestamp_ms`` in milliseconds) and
Qwen-Bailian (``timestamp`` in seconds, with ``chat_id``). ServeGen is read by
:mod:`aptserve.workload.servegen`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from aptserve.workload.records import (
    Record,
    TraceFormatError,
    csv_columns,
    csv_records,
    date_time,
    first_line,
    json_records,
    milliseconds,
    number,
    tokens,
)
from aptserve.workload.rows import Rows
from aptserve.workload.servegen import RATE_COLUMNS, read_servegen
from aptserve.workload.trace import Lengths, Trace


@dataclass(frozen=True, slots=True)
class _Format:
    """Where a published format has its columns."""

    name: str
    prompt: str
    output: str
    time: str | None = None
    to_seconds: Callable[[object], float] = number
    marker: str | None = None
    """A further column by which the format is known."""
    has_ticks: bool = False
    """Arrivals are known to be quantised."""

    @property
    def columns(self) -> list[str]:
        """What a file of this format must have."""
        columns = (self.time, self.prompt, self.output, self.marker)
        return [column for column in columns if column is not None]

    def add(self, record: Record, rows: Rows) -> None:
        """Take one row."""
        rows.add(
            None if self.time is None else record.get(self.time, self.to_seconds),
            record.get(self.prompt, tokens),
            record.get(self.output, tokens),
        )


# The first one that matches is taken.
_CSV_FORMATS = (
    _Format("lengths with arrivals", "input_tokens", "output_tokens", "arrival_s"),
    _Format("lengths", "input_tokens", "output_tokens"),
    _Format("Azure", "ContextTokens", "GeneratedTokens", "TIMESTAMP", date_time),
    _Format("BurstGPT", "Request tokens", "Response tokens", "Timestamp"),
)
_JSON_FORMATS = (
    _Format("Qwen-Bailian", "input_length", "output_length", "timestamp", marker="chat_id"),
    _Format(
        "Mooncake", "input_length", "output_length", "timestamp_ms", milliseconds, has_ticks=True
    ),
    _Format("Mooncake", "input_length", "output_length", "timestamp", milliseconds, has_ticks=True),
)


def read_workload(path: Path, *, seed: int = 0) -> Trace | Lengths:
    """The requests of a trace file: a :class:`Trace`, or :class:`Lengths` if it has no arrivals.

    A folder, or the file with its rates, is read as ServeGen, whose requests ``seed`` draws; all
    else is read as it stands. :class:`TraceFormatError` says what cannot be read, and where.
    """
    if path.is_dir():
        return read_servegen(path, seed=seed)
    if first_line(path).lstrip().startswith("{"):
        records = json_records(path)
        record = next(records)
        found = _find(_JSON_FORMATS, list(record.values), path)
        return _read(path, chain([record], records), found)
    columns = csv_columns(path)
    if RATE_COLUMNS.issubset(columns):
        return read_servegen(path, seed=seed)
    return _read(path, csv_records(path), _find(_CSV_FORMATS, columns, path))


def _read(path: Path, records: Iterable[Record], found: _Format) -> Trace | Lengths:
    rows = Rows()
    for record in records:
        found.add(record, rows)
    if not rows.prompts:
        raise TraceFormatError(path, "has no row with both prompt and output tokens")
    return rows.to_workload(path.stem, has_ticks=found.has_ticks)


def _find(formats: tuple[_Format, ...], columns: list[str], path: Path) -> _Format:
    for candidate in formats:
        if set(candidate.columns).issubset(columns):
            return candidate
    known = "; ".join(f"{format_.name} ({','.join(format_.columns)})" for format_ in formats)
    found = ",".join(columns) if len(columns) > 1 else "no columns"
    raise TraceFormatError(path, f"has {found}, none of the known formats: {known}")
