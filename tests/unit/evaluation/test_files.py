"""JSON out and in."""

import json
from pathlib import Path

import pytest
from aptserve.evaluation import Bound, Evaluation, FoundRate, goodput_of
from aptserve.evaluation.files import (
    EvaluationFormatError,
    from_json,
    load_evaluation,
    save_evaluation,
    to_json,
)
from support.evaluation import CELL, TIMELINE, make_run

GOODPUT = goodput_of(CELL, FoundRate(0.9, 2.0, Bound.AT_LEAST, 3), [{1.0: 1.0}])
EVALUATION = Evaluation(
    (make_run(timeline=TIMELINE), make_run(seed=1), make_run(cv=None, num_good=10)), (GOODPUT,)
)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    save_evaluation(EVALUATION, path)
    assert load_evaluation(path) == EVALUATION


def test_equal_evaluations_give_equal_text() -> None:
    assert to_json(Evaluation(EVALUATION.runs[::-1], (GOODPUT,))) == to_json(EVALUATION)


def test_a_run_is_small_and_a_cell_is_written_once() -> None:
    runs = tuple(make_run(seed=seed) for seed in range(50))
    text = to_json(Evaluation(runs))
    assert len(text) < 50 * 800
    assert len(json.loads(text)["cells"]) == 1
    assert from_json(to_json(Evaluation(()))) == Evaluation(())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is no JSON"),
        ("[]", "format"),
        ('{"format": "other", "version": 1}', "format"),
        ('{"format": "aptserve-evaluation", "version": 2}', "version: must be 1, not 2"),
        ('{"format": "aptserve-evaluation", "version": 1, "cells": []}', "runs"),
        (
            '{"format": "aptserve-evaluation", "version": 1, "cells": [], "goodputs": [],'
            ' "runs": [{"cell": 0}]}',
            "fields",
        ),
    ],
)
def test_other_documents_are_refused(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(EvaluationFormatError, match=problem):
        from_json(text)
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(EvaluationFormatError, match=r"wrong\.json"):
        load_evaluation(path)
