"""ServeGen's clients: rates, burstiness and lengths as published."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from aptserve.workload import TraceFormatError, read_servegen, read_workload

Write = Callable[[str, str], Path]

HEADER = "client_id,window_start_s,rate_rps,cv,pattern,pattern_arg1,pattern_arg2\n"
ROWS = (
    "7,0,20,1,Gamma,1.0,0.05\n"
    "7,600,5,1,Gamma,1.0,0.2\n"
    "8,0,10,2.24,Gamma,0.2,0.5\n"
    "9,600,10,1,Weibull,2.0,0.1\n"
)


def length_line(client: int, field: str, pmf: dict[str, float]) -> str:
    return json.dumps({"client_id": client, "field": field, "mean_rate_rps": 1, "pmf": pmf}) + "\n"


LENGTHS = "".join(
    length_line(client, "input_tokens", {str(client): 1.0})
    + length_line(client, "output_tokens", {"0": 0.1, "2": 0.675, "4": 0.225})
    for client in (7, 8, 9)
)


@pytest.fixture
def rates(write: Write) -> Path:
    write("small_lengths.jsonl", LENGTHS)
    return write("small_rates.csv", HEADER + ROWS)


def test_each_client_sends_at_its_rate_with_its_lengths(rates: Path) -> None:
    trace = read_servegen(rates, seed=1)
    counts = Counter(trace.tenants)
    assert set(counts) == {"7", "8"}
    assert counts["7"] == pytest.approx(12_000, rel=0.05)
    assert counts["8"] == pytest.approx(6_000, rel=0.15)
    assert [int(tenant) for tenant in trace.tenants] == trace.num_prompt_tokens.tolist()
    assert set(trace.num_output_tokens.tolist()) == {2, 4}
    assert (trace.num_output_tokens == 2).mean() == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize(("client", "cv"), [("7", 1.0), ("8", 5**0.5)])
def test_gaps_vary_as_their_shape_says(rates: Path, client: str, cv: float) -> None:
    trace = read_servegen(rates, seed=2)
    own = np.array([tenant == client for tenant in trace.tenants])
    gaps = np.diff(trace.arrival_seconds[own])
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_rates_shift_from_window_to_window(rates: Path) -> None:
    counts = Counter(read_servegen(rates, seed=3, start_seconds=600).tenants)
    assert counts["7"] == pytest.approx(3_000, rel=0.1)
    assert counts["9"] == pytest.approx(6_000, rel=0.1)
    assert "8" not in counts


def test_a_span_may_cross_windows(rates: Path) -> None:
    trace = read_servegen(rates, seed=4, start_seconds=300, duration_seconds=600)
    counts = Counter(trace.tenants)
    assert counts["7"] == pytest.approx(300 * 25, rel=0.1)
    assert 590 < trace.arrival_seconds[-1] < 600
    assert trace.note == "drawn from second 300 to 900, seed 4"


def test_the_seed_decides(rates: Path) -> None:
    first, again, other = (
        read_servegen(rates, seed=seed, duration_seconds=5) for seed in (1, 1, 2)
    )
    assert first.arrival_seconds.tolist() == again.arrival_seconds.tolist()
    assert first.tenants == again.tenants
    assert first.arrival_seconds.tolist() != other.arrival_seconds.tolist()


def test_a_folder_and_the_general_reader_find_the_files(rates: Path, write: Write) -> None:
    write("other.csv", "a,b\n1,2\n")
    write("empty.csv", "")
    expected = read_servegen(rates, seed=5).arrival_seconds.tolist()
    assert read_servegen(rates.parent, seed=5).arrival_seconds.tolist() == expected
    for path in (rates, rates.parent):
        trace = read_workload(path, seed=5)
        assert trace.arrival_seconds.tolist() == expected  # type: ignore[union-attr]


def test_lengths_are_found_by_content_when_named_otherwise(rates: Path) -> None:
    (rates.parent / "small_lengths.jsonl").rename(rates.parent / "tokens.jsonl")
    assert len(read_servegen(rates, seed=0, duration_seconds=10)) > 0


def test_a_folder_without_rates_or_lengths_is_an_error(rates: Path, tmp_path: Path) -> None:
    (rates.parent / "small_lengths.jsonl").unlink()
    with pytest.raises(TraceFormatError, match=r"one \.jsonl file with ServeGen lengths.* none"):
        read_servegen(rates, seed=0)
    rates.unlink()
    with pytest.raises(TraceFormatError, match=r"one \.csv file with ServeGen rates.* none"):
        read_servegen(tmp_path, seed=0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("7,0,0,1,Gamma,1,1", "line 2, column rate_rps: '0' is not above 0"),
        ("7,0,1,1,Pareto,1,1", "line 2, column pattern: 'Pareto' is neither"),
        ("7,0,1,1,Weibull,0.001,1", "line 2, column pattern_arg1: '0.001' is not a shape"),
        ("6,0,1,1,Gamma,1,1", "line 2, column client_id: client 6 has no lengths"),
        ("7,1200,1,1,Gamma,1,1", "has no window between 0 s and 600 s"),
    ],
)
def test_an_error_in_the_rates_says_where(write: Write, row: str, message: str) -> None:
    write("bad_lengths.jsonl", LENGTHS)
    path = write("bad_rates.csv", HEADER + row + "\n")
    with pytest.raises(TraceFormatError, match=message):
        read_servegen(path, seed=0)


@pytest.mark.parametrize(
    ("pmf", "message"),
    [
        ({"0": 1.0}, "column pmf: needs probabilities"),
        ({"3": -0.5, "4": 1.5}, "column pmf: needs probabilities"),
        ({"x": 1.0}, "column pmf: 'x' is not a number of tokens"),
    ],
)
def test_an_error_in_the_lengths_says_where(
    write: Write, pmf: dict[str, float], message: str
) -> None:
    write("bad_lengths.jsonl", length_line(7, "input_tokens", pmf))
    path = write("bad_rates.csv", HEADER + ROWS)
    with pytest.raises(TraceFormatError, match=f"bad_lengths.jsonl, line 1, {message}"):
        read_servegen(path, seed=0)


def test_a_span_out_of_range_is_named(rates: Path) -> None:
    with pytest.raises(ValueError, match=r"^start_seconds: must be at least 0"):
        read_servegen(rates, seed=0, start_seconds=-1)
    with pytest.raises(ValueError, match=r"^duration_seconds: must be above 0"):
        read_servegen(rates, seed=0, duration_seconds=0)
    with pytest.raises(ValueError, match="no request arrives"):
        read_servegen(rates, seed=0, duration_seconds=1e-9)
