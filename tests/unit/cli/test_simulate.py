"""``aptserve simulate`` from flags to files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from aptserve.cli.simulate.values import parse_cvs, parse_names, parse_rates, parse_targets
from aptserve.evaluation.files import load_evaluation
from support.commands import Cli

SMALL = ("simulate", "--trace", "humaneval", "-n", "10", "--jobs", "1")


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        ("4", (4,)),
        ("1,2,4", (1, 2, 4)),
        (" 4, 1,4", (1, 4)),
        ("1:4:1", (1, 2, 3, 4)),
        ("0.1:0.3:0.1", (0.1, 0.2, 0.3)),
        ("1:2:3", (1,)),
    ],
)
def test_rates(text: str, rates: tuple[float, ...]) -> None:
    assert parse_rates(text) == rates


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "1:2", "2:1:1", "1:2:0", "1:9:1e-9", "inf"])
def test_wrong_rates_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_rates(text)


def test_other_lists() -> None:
    assert parse_names("apt, fcfs,apt") == ("apt", "fcfs")
    assert parse_cvs("5,1,0") == (0, 1, 5)
    assert parse_targets("0.9,0.5") == (0.5, 0.9)
    for parse, text in ((parse_names, "a,,b"), (parse_cvs, "-1"), (parse_targets, "1.1")):
        with pytest.raises(ValueError, match=r"."):
            parse(text)


def test_one_run_is_told_in_full(cli: Cli) -> None:
    outcome = cli(*SMALL, "--rate", "4", "--policy", "apt", "--tiers", "kv")
    assert (outcome.code, outcome.err) == (0, "")
    assert "humaneval · opt-13b on a100-40g, kv" in outcome.out
    assert "TTFT 0.5 s, P99 TBT 0.5 s" in outcome.out
    assert "95 % interval" in outcome.out


def test_a_grid_and_a_search_with_all_files(cli: Cli, tmp_path: Path) -> None:
    document, picture, page = (tmp_path / name for name in ("o.json", "o.png", "o.html"))
    outcome = cli(
        *(*SMALL, "--policy", "apt,fcfs", "--rate", "32,64", "--goodput", "0.5"),
        *("--slo-ttft", "200ms", "--slo-tbt", "1s", "--hidden-attention", "reprojected"),
        *("--json", str(document), "--plot", str(picture), "--html", str(page)),
    )
    assert (outcome.code, outcome.err) == (0, "")
    assert "50% good" in " ".join(outcome.out.split())
    evaluation = load_evaluation(document)
    assert {run.rate for run in evaluation.runs} > {32.0, 64.0}
    assert {run.cell.policy for run in evaluation.runs} == {"apt", "fcfs"}
    assert {run.cell.system for run in evaluation.runs} == {
        "opt-13b on a100-40g, kv+hidden (reprojected)"
    }
    assert {found.cell.ttft_objective_seconds for found in evaluation.goodputs} == {0.2}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert page.read_text().startswith("<!doctype html>")


def test_a_trace_keeps_its_arrivals_and_may_be_short(cli: Cli, tmp_path: Path) -> None:
    trace = tmp_path / "made.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,8,2\n1,9,3\n3,9,9000\n")
    out = tmp_path / "o.json"
    arguments = ("--trace", str(trace), "--policy", "fcfs", "--jobs", "1", "--json", str(out))
    assert cli("simulate", *arguments).code == 0
    (run,) = load_evaluation(out).runs
    assert (run.cell.workload, run.cell.cv, run.rate, run.num_offered) == ("made", None, None, 3)
    assert run.arrival_span_seconds == 3.0
    assert run.num_output_tokens == 2 + 3 + 2047  # the model's context


def test_several_workers_as_measured(cli: Cli, tmp_path: Path) -> None:
    seconds = {
        "base_seconds": 0.01,
        "seconds_per_token": 1e-4,
        "seconds_per_sequence": 0.0,
        "seconds_per_attention_pair": 0.0,
    }
    worker = {
        "worker_id": "here",
        "num_units": 400,
        "block_size": 16,
        "tiers": [{"tier": "kv", "units_per_block": 2, "exact": True}],
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "calibration": seconds | {"tiers": [{"tier": "kv", "seconds_per_cached_token": 0.0}]},
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"workers": [worker]}))
    outcome = cli(
        *(*SMALL, "--policy", "fcfs", "--rate", "1", "--workers", "2", "--calibration", str(path))
    )
    assert (outcome.code, outcome.err) == (0, "")
    assert "2 x here as measured, kv" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--trace", "nothing"), "--trace: 'nothing' is neither a file nor one of"),
        (("--rate", "0"), "--rate: must be above 0"),
        (("--rate", "1", "--cv", "x"), "--cv: 'x' is no number"),
        (("--policy", "nobody", "--rate", "1"), "--policy: unknown policy 'nobody'"),
        (("--policy", ",", "--rate", "1"), "--policy: ',' has an empty name"),
        (("--model", "gpt", "--rate", "1"), "--model: 'gpt' is none of"),
        (("--gpu", "abacus", "--rate", "1"), "--gpu: 'abacus' is none of"),
        (("--tiers", "hidden", "--rate", "1"), "--tiers: must start with kv"),
        (("--tiers", "kv,disk", "--rate", "1"), "--tiers: 'disk' is none of"),
        (("--model", "llama-3-8b", "--rate", "1"), "--tiers, --hidden-attention: a hidden tier"),
        (("--goodput", "2"), "--goodput: must be above 0 and at most 1"),
        (("--plot", "out.pdf", "--rate", "1"), "--plot: out.pdf must end in .png"),
        (("--json", "/none/such/o.json", "--rate", "1"), "--json: /none/such/o.json is no file"),
        (("--calibration", "/none", "--rate", "1"), "--calibration: [Errno 2]"),
        (("--calibration", "x", "--gpu", "h100"), "--gpu: --calibration says it already"),
        ((), "--rate: is needed, humaneval has no arrivals of its own"),
        (("--slo-ttft", "soon"), "Invalid value for '--slo-ttft'"),
    ],
)
def test_wrong_values_name_the_flag(cli: Cli, arguments: tuple[str, ...], problem: str) -> None:
    outcome = cli(*SMALL, *arguments)
    assert outcome.code == 2
    assert problem in outcome.error_line
