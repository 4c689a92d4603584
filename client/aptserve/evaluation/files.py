"""Evaluations as JSON: all that tables and figures need, and no record of a single request.

The document is ``{"format": "aptserve-evaluation", "version": 1, "cells": [...], "runs": [...],
"goodputs": [...]}``. Runs and goodputs name their cell by its place in ``cells``; everything else
has the names of the fields of :class:`RunReport` and :class:`Goodput`. Equal evaluations give equal
text.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from aptserve.evaluation.evaluation import Evaluation
from aptserve.evaluation.goodput import Bound, Goodput
from aptserve.evaluation.report import Cell, Percentiles, RunReport
from aptserve.evaluation.timeline import PoolTimeline

FORMAT = "aptserve-evaluation"
VERSION = 1

_Fields = dict[str, Any]


class EvaluationFormatError(ValueError):
    """A document that is no evaluation of a version known here."""


def to_json(evaluation: Evaluation) -> str:
    """The document, a line for each cell, run and goodput."""
    cells = evaluation.cells()
    number_of = {cell: number for number, cell in enumerate(cells)}
    members = (
        f'"format": {json.dumps(FORMAT)}',
        f'"version": {VERSION}',
        _lines("cells", (dataclasses.asdict(cell) for cell in cells)),
        _lines("runs", (_run_fields(run, number_of) for run in evaluation.runs)),
        _lines("goodputs", (_goodput_fields(found, number_of) for found in evaluation.goodputs)),
    )
    return "{\n" + ",\n".join(members) + "\n}\n"


def from_json(text: str) -> Evaluation:
    """The evaluation of a document; :class:`EvaluationFormatError` says what is wrong with it."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise EvaluationFormatError(f"is no JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise EvaluationFormatError(f"format: must be {FORMAT!r}")
    if document.get("version") != VERSION:
        found = document.get("version")
        raise EvaluationFormatError(f"version: must be {VERSION}, not {found!r}")
    try:
        cells = [Cell(**fields) for fields in document["cells"]]
        runs = tuple(_run(fields, cells) for fields in document["runs"])
        goodputs = tuple(_goodput(fields, cells) for fields in document["goodputs"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise EvaluationFormatError(f"has other fields than version {VERSION}: {error}") from None
    return Evaluation(runs, goodputs)


def save_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Write the document. OSError as the file system has it."""
    path.write_text(to_json(evaluation), encoding="utf-8")


def load_evaluation(path: Path) -> Evaluation:
    """Read a document; :class:`EvaluationFormatError` names the file and what is wrong."""
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (EvaluationFormatError, UnicodeDecodeError) as error:
        raise EvaluationFormatError(f"{path}: {error}") from None


def _lines(name: str, values: Iterable[_Fields]) -> str:
    rows = [json.dumps(value, ensure_ascii=False, allow_nan=False) for value in values]
    return f'"{name}": [' + ("\n" + ",\n".join(rows) + "\n" if rows else "") + "]"


def _run_fields(run: RunReport, number_of: Mapping[Cell, int]) -> _Fields:
    fields = dataclasses.asdict(run) | {"cell": number_of[run.cell]}
    if run.timeline is None:
        del fields["timeline"]
    return fields


def _run(fields: _Fields, cells: list[Cell]) -> RunReport:
    timeline = fields.get("timeline")
    changes = {
        "cell": cells[fields["cell"]],
        "ttft_seconds": _percentiles(fields["ttft_seconds"]),
        "missed_ttft_seconds": _percentiles(fields["missed_ttft_seconds"]),
        "timeline": None if timeline is None else _timeline(timeline),
    }
    return RunReport(**(fields | changes))


def _goodput_fields(found: Goodput, number_of: Mapping[Cell, int]) -> _Fields:
    return {
        **{field.name: getattr(found, field.name) for field in dataclasses.fields(found)},
        "cell": number_of[found.cell],
        "bound": found.bound.value,
    }


def _goodput(fields: _Fields, cells: list[Cell]) -> Goodput:
    changes = {
        "cell": cells[fields["cell"]],
        "bound": Bound(fields["bound"]),
        "seed_rates": tuple(fields["seed_rates"]),
    }
    return Goodput(**(fields | changes))


def _percentiles(fields: _Fields | None) -> Percentiles | None:
    return None if fields is None else Percentiles(**fields)


def _timeline(fields: _Fields) -> PoolTimeline:
    series = {name: tuple(fields[name]) for name in ("seconds", "num_waiting", "num_running")}
    used = {tier: tuple(values) for tier, values in fields["used_units"].items()}
    return PoolTimeline(**(fields | series | {"used_units": used}))
