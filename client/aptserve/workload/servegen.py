"""ServeGen: many clients whose rates and burstiness shift from window to window.

Two files. Rates, a CSV with the columns of :data:`RATE_COLUMNS`: one row for each client and
window of 600 s, with the fitted distribution of its gaps. Lengths, JSON lines with ``client_id``,
``field`` (``input_tokens`` or ``output_tokens``) and ``pmf``, from token count to probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from aptserve.workload.clients import ClientWindow, Pattern, TokenCounts, draw_clients
from aptserve.workload.records import (
    Record,
    TraceFormatError,
    csv_columns,
    csv_records,
    first_line,
    json_records,
    number,
    tokens,
)
from aptserve.workload.trace import Trace

WINDOW_SECONDS = 600.0
RATE_COLUMNS = frozenset({"client_id", "window_start_s", "rate_rps", "pattern", "pattern_arg1"})
"""Columns that make a CSV file ServeGen's rates.

``pattern_arg2``, the fitted scale, is not used: where a window holds few requests the mean of the
fit is far off the window's own rate, so the scale is taken from rate and shape.
"""

_MIN_SHAPE = 0.006
"""The mean of a Weibull distribution overflows below."""

_Lengths = Mapping[tuple[str, str], TokenCounts]
"""Distributions by client and field."""


def read_servegen(
    path: Path,
    *,
    seed: int,
    start_seconds: float = 0.0,
    duration_seconds: float = WINDOW_SECONDS,
) -> Trace:
    """Requests drawn from ServeGen's clients in ``[start, start + duration)``.

    ``path`` is the file with the rates or a folder that holds one. Tenants are the client ids.
    :class:`TraceFormatError` says what cannot be read, ValueError names an argument out of range.
    """
    if not (math.isfinite(start_seconds) and start_seconds >= 0):
        raise ValueError(f"start_seconds: must be at least 0, not {start_seconds:g}")
    if not (math.isfinite(duration_seconds) and duration_seconds > 0):
        raise ValueError(f"duration_seconds: must be above 0, not {duration_seconds:g}")
    rates = _rates_file(path)
    lengths_file = _lengths_file(rates)
    lengths = _read_lengths(lengths_file)
    end_seconds = start_seconds + duration_seconds
    windows = _read_windows(rates, start_seconds, end_seconds, lengths)
    if not windows:
        span = f"between {start_seconds:g} s and {end_seconds:g} s"
        raise TraceFormatError(rates, f"has no window {span}")
    note = f"drawn from second {start_seconds:g} to {end_seconds:g}, seed {seed}"
    return draw_clients(rates.stem, windows, seed, note)


def _read_windows(path: Path, start: float, end: float, lengths: _Lengths) -> list[ClientWindow]:
    """The parts of all windows between start and end, by client and time."""
    windows = []
    for record in csv_records(path):
        begin = record.get("window_start_s", number)
        if begin < end and begin + WINDOW_SECONDS > start:
            span = max(begin, start), min(begin + WINDOW_SECONDS, end)
            windows.append(_window(record, *span, lengths))
    return sorted(windows, key=lambda window: (window.client, window.begin_seconds))


def _window(record: Record, begin: float, end: float, lengths: _Lengths) -> ClientWindow:
    client = record.get("client_id", str)
    prompts = lengths.get((client, "input_tokens"))
    outputs = lengths.get((client, "output_tokens"))
    if prompts is None or outputs is None:
        raise record.error(f"client {client} has no lengths of both fields", "client_id")
    return ClientWindow(
        client=client,
        begin_seconds=begin,
        end_seconds=end,
        rate=record.get("rate_rps", _rate),
        pattern=record.get("pattern", _pattern),
        shape=record.get("pattern_arg1", _shape),
        prompts=prompts,
        outputs=outputs,
    )


def _rate(value: object) -> float:
    rate = number(value)
    if rate <= 0:
        raise ValueError(f"{value!r} is not above 0")
    return rate


def _pattern(value: object) -> Pattern:
    if value == "Gamma":
        return "Gamma"
    if value == "Weibull":
        return "Weibull"
    raise ValueError(f"{value!r} is neither Gamma nor Weibull")


def _shape(value: object) -> float:
    shape = number(value)
    if shape < _MIN_SHAPE:
        raise ValueError(f"{value!r} is not a shape of at least {_MIN_SHAPE}")
    return shape


def _read_lengths(path: Path) -> _Lengths:
    return {
        (record.get("client_id", str), record.get("field", str)): record.get("pmf", _token_counts)
        for record in json_records(path)
    }


def _token_counts(value: object) -> TokenCounts:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not a map from token count to probability")
    # A request that can be played has a prompt and an output: the rare counts of 0 are left out.
    pmf = {count: number(chance) for key, chance in value.items() if (count := tokens(key)) > 0}
    chances = np.array(list(pmf.values()))
    if (chances < 0).any() or not chances.sum() > 0:
        raise ValueError("needs probabilities of at least 0, one of them above")
    cumulative = np.cumsum(chances)
    return TokenCounts(np.array(list(pmf), np.int64), cumulative / cumulative[-1])


def _rates_file(path: Path) -> Path:
    """The file itself, or the one in the folder that has the columns of rates."""
    if not path.is_dir():
        return path
    return _only(path, "csv", "rates", lambda file: RATE_COLUMNS.issubset(csv_columns(file)))


def _lengths_file(rates: Path) -> Path:
    """The file named like the rates, else the one in their folder that holds lengths."""
    namesake = rates.with_name(f"{rates.stem.removesuffix('_rates')}_lengths.jsonl")
    if namesake.exists():
        return namesake
    return _only(rates.parent, "jsonl", "lengths", lambda file: '"pmf"' in first_line(file))


def _only(folder: Path, ending: str, what: str, accepts: Callable[[Path], bool]) -> Path:
    found = [path for path in sorted(folder.glob(f"*.{ending}")) if _is(path, accepts)]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        reason = f"must hold one .{ending} file with ServeGen {what}, but holds {names}"
        raise TraceFormatError(folder, reason)
    return found[0]


def _is(path: Path, accepts: Callable[[Path], bool]) -> bool:
    try:
        return accepts(path)
    except TraceFormatError:  # empty, or not text: some other file
        return False
