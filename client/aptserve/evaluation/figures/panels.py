"""Which panels a figure has: workloads and systems down, burstiness across."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from aptserve.evaluation.report import Cell

Row = tuple[str, str]
"""Workload and system."""


def grid_of(cells: Iterable[Cell]) -> tuple[list[Row], list[float | None]]:
    """Rows and columns that the cells need, in order of first appearance."""
    cells = list(cells)
    rows = list(dict.fromkeys((cell.workload, cell.system) for cell in cells))
    return rows, list(dict.fromkeys(cell.cv for cell in cells))


def row_title(row: Row, rows: Sequence[Row]) -> str:
    """What tells a row from the others, as a prefix of its label; nothing when there is one."""
    parts = [part for place, part in enumerate(row) if len({other[place] for other in rows}) > 1]
    return "\n".join([*(part.replace(", ", ",\n") for part in parts), ""])


def column_title(cv: float | None) -> str:
    """The burstiness of a panel."""
    return "arrivals of the trace" if cv is None else f"CV {cv:g}"


def title_of(subject: str, cells: Iterable[Cell]) -> str:
    """What a figure shows, and what all its panels share."""
    cells = list(cells)
    workloads = {cell.workload for cell in cells}
    systems = {cell.system for cell in cells}
    shared = (next(iter(names)) for names in (workloads, systems) if len(names) == 1)
    return " · ".join([subject, *shared])
