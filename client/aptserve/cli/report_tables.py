"""Reports of runs, live or simulated, on a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from aptserve.evaluation import Evaluation, RunReport
from aptserve.evaluation.tables import (
    TextTable,
    goodput_table,
    objectives_table,
    run_table,
    waiting_table,
)


def report_view(run: RunReport) -> Group:
    """Everything about one run."""
    text = run_table(run)
    table = Table.grid(padding=(0, 2))
    for name, value in text.rows:
        table.add_row(Text(name, "dim"), Text(value, "bold" if name == "good" else ""))
    return _titled(text, table)


def evaluation_view(evaluation: Evaluation) -> Group:
    """A row for each case, policy and rate, and the goodputs if they were searched."""
    texts = []
    if evaluation.runs:
        texts += [waiting_table(evaluation), objectives_table(evaluation)]
    if evaluation.goodputs:
        texts.append(goodput_table(evaluation))
    return Group(*(_titled(text, _table(text)) for text in texts))


def _table(text: TextTable) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, name in enumerate(text.columns):
        is_label = index < text.num_labels
        table.add_column(
            Text(name if is_label else name.replace(" ", "\n")),
            justify="left" if is_label else "right",
            style="bold" if name == "good %" else None,
            min_width=_min_width(name, [row[index] for row in text.rows]),
            vertical="bottom",
        )
    for row in text.rows:
        table.add_row(*map(Text, row))
    return table


def _min_width(heading: str, cells: list[str]) -> int:
    """A heading takes a line for each word, a cell a line."""
    return max(map(len, [*heading.split(), *cells]), default=1)


def _titled(text: TextTable, table: Table) -> Group:
    notes = (Text(note, "dim") for note in text.notes)
    return Group(Text(text.title, "bold cyan"), table, *notes)
