"""One HTML page of an evaluation that needs nothing but itself: figures, tables, no script."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from html import escape

from aptserve.evaluation.evaluation import Evaluation
from aptserve.evaluation.figures import NamedFigure, figures_of
from aptserve.evaluation.tables import TextTable, detailed_table, goodput_table

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
img { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.87rem; }
th, td { padding: 0.25rem 0.6rem; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #888; vertical-align: bottom; white-space: normal; }
td { border-bottom: 1px solid #e3e3e3; }
.label { text-align: left; }
.note { color: #666; font-size: 0.85rem; margin: 0.2rem 0; }
"""


def html_page(evaluation: Evaluation, title: str, introduction: str = "") -> str:
    """The page; equal evaluations give equal pages. Needs matplotlib."""
    body = [f"<h1>{escape(title)}</h1>"]
    if introduction:
        body.append(f"<p>{escape(introduction)}</p>")
    body += [_figure(figure) for figure in figures_of(evaluation)]
    if evaluation.goodputs:
        body += _table(goodput_table(evaluation))
    if evaluation.runs:
        body += _table(detailed_table(evaluation))
        body += _notes(evaluation)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _figure(figure: NamedFigure) -> str:
    data = base64.b64encode(figure.png()).decode("ascii")
    title = escape(figure.title)
    return f'<h2>{title}</h2>\n<img alt="{title}" src="data:image/png;base64,{data}">'


def _table(table: TextTable) -> Iterator[str]:
    yield f'<h2>{escape(table.title)}</h2>\n<div class="scroll"><table>'
    yield f"<thead>{_row(table.columns, 'th', table.num_labels)}</thead>\n<tbody>"
    for row in table.rows:
        yield _row(row, "td", table.num_labels)
    yield "</tbody></table></div>"
    for note in table.notes:
        yield f'<p class="note">{escape(note)}</p>'


def _row(cells: tuple[str, ...], tag: str, num_labels: int) -> str:
    text = "".join(
        f"<{tag}{' class=label' if place < num_labels else ''}>{escape(cell)}</{tag}>"
        for place, cell in enumerate(cells)
    )
    return f"<tr>{text}</tr>"


def _notes(evaluation: Evaluation) -> Iterator[str]:
    """What was done to each workload, as its first run has it."""
    first = {run.cell.workload: run for run in reversed(evaluation.runs)}
    for workload, run in sorted(first.items()):
        if run.note:
            text = f"{workload}: {run.num_offered:,} requests; first run: {run.note}"
            yield f'<p class="note">{escape(text)}</p>'
