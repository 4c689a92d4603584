"""Tables, figures and the page."""

import io
from dataclasses import replace

import numpy as np
import pytest
from aptserve.evaluation import Bound, Evaluation, FoundRate, goodput_of
from aptserve.evaluation.figures import figures_of, one_figure
from aptserve.evaluation.page import html_page
from aptserve.evaluation.tables import (
    detailed_table,
    goodput_table,
    objectives_table,
    run_table,
    waiting_table,
)
from support.evaluation import CELL, TIMELINE, make_run

RUNS = tuple(
    make_run(
        num_good=good - seed,
        rate=rate,
        seed=seed,
        policy=policy,
        timeline=TIMELINE if (rate, seed) == (1.0, 0) else None,
    )
    for policy in ("apt", "fcfs")
    for rate, good in ((1.0, 10), (2.0, 6))
    for seed in (0, 1)
)
GOODPUTS = tuple(
    goodput_of(replace(CELL, policy=policy), FoundRate(0.9, 1.5, bound, 5), seeds)
    for policy, bound, seeds in (
        ("apt", Bound.FOUND, [{1.0: 1.0, 2.0: 0.6}, {1.0: 0.95, 2.0: 0.6}]),
        ("fcfs", Bound.BELOW, [{1.5: 0.5}, {1.5: 0.5}]),
    )
)
EVALUATION = Evaluation(RUNS, GOODPUTS)


def test_rows_have_what_differs_and_the_title_what_does_not() -> None:
    table = objectives_table(EVALUATION)
    assert table.title == "sharegpt · a machine · CV 1 · TTFT / P99 TBT 1 / 1 s"
    assert table.columns[: table.num_labels] == ("policy",)
    assert [row[:3] for row in table.rows] == [
        ("apt", "1", "95.0 ± 63.5"),
        ("apt", "2", "55.0 ± 63.5"),
        ("fcfs", "1", "95.0 ± 63.5"),
        ("fcfs", "2", "55.0 ± 63.5"),
    ]
    bursty = objectives_table(Evaluation((*RUNS, make_run(cv=None))))
    assert bursty.columns[: bursty.num_labels] == ("CV", "policy")
    assert bursty.rows[0][0] == "real"


def test_every_row_of_every_table_has_all_columns() -> None:
    for table in (
        objectives_table(EVALUATION),
        waiting_table(EVALUATION),
        detailed_table(EVALUATION),
        goodput_table(EVALUATION),
        run_table(RUNS[0]),
    ):
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_goodputs_say_how_they_are_to_be_read() -> None:
    table = goodput_table(EVALUATION)
    assert table.rows[0][1].startswith("1.5 ± ")
    assert table.rows[1][1] == "< 1.5"
    assert any(note.startswith("<") for note in table.notes)


def test_one_run_is_told_with_its_wilson_interval() -> None:
    rows = dict(run_table(make_run()).rows)
    assert rows["good"] == "90.0 % (95 % interval 59.6% to 98.2%)"
    assert rows["pool, mean"] == "-"


def test_there_is_a_figure_for_what_there_is() -> None:
    titles = [figure.title.split(" · ")[0] for figure in figures_of(EVALUATION)]
    assert titles == [
        "Requests within both objectives",
        "Goodput",
        "Memory pool by tier, and the queue",
    ]
    assert figures_of(Evaluation((make_run(),))) == []
    with pytest.raises(ValueError, match="figures"):
        one_figure([])


def test_equal_data_give_an_equal_picture_with_something_on_it() -> None:
    from matplotlib.image import imread

    goodput = figures_of(EVALUATION)[1:2]
    first, second = (one_figure(goodput) for _ in range(2))
    assert first == second
    pixels = imread(io.BytesIO(first))
    assert np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0).shape[0] > 20


def test_no_panel_is_cut_by_the_scale_of_the_first() -> None:
    from matplotlib.figure import Figure

    low, high = (
        goodput_of(CELL, FoundRate(target, rate, Bound.FOUND, 5), [])
        for target, rate in ((0.9, 1.0), (0.5, 9.0))
    )
    queued = make_run(policy="fcfs", timeline=replace(TIMELINE, num_waiting=(0, 70, 0)))
    evaluation = Evaluation((make_run(timeline=TIMELINE), queued), (low, high))
    goodput, timeline = figures_of(evaluation)
    for drawn, top in ((goodput, 9.0), (timeline, 70.0)):
        figure = Figure()
        drawn.draw(figure)
        bottom, limit = figure.axes[-1].get_ylim()
        assert bottom == 0
        assert limit >= top


def test_the_page_needs_nothing_else() -> None:
    page = html_page(EVALUATION, "Fast & <good>", "What for.")
    assert "<h1>Fast &amp; &lt;good&gt;</h1>" in page
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 3
    assert "http" not in page
    assert page.count("<tr>") == 1 + 2 + 1 + 4
