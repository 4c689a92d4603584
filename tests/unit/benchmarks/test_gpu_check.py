"""The check of a GPU, as far as it can be tried without one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from aptserve_kernels.costs import Gpu
from aptserve_worker.config import WorkerSettings

from benchmarks.gpu_check import (
    apart,
    correctness,
    end_to_end,
    kernel_times,
    parts,
    report,
    stand_ins,
)
from benchmarks.gpu_check.context import Context, Deadline
from benchmarks.gpu_check.lab import Check, Lab, error_of, num_different
from benchmarks.gpu_check.parts import Part, has_failed, run_parts
from benchmarks.gpu_check.timing import ClockTimer, Timing

ROOT = Path(__file__).parents[3]
NAN = float("nan")


def make_context(**changes: Any) -> Context:
    values = {"is_dry": True, "say": lambda _: None, "deadline": Deadline(100.0), **changes}
    return Context(torch.device("cpu"), ClockTimer(), **values)


def make_part(name: str, **changes: Any) -> Part:
    values: dict[str, Any] = {"needs": (), "least_seconds": 0.0, "most_seconds": 10.0, **changes}
    return Part(name, name, **values)


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )


def kept() -> dict[str, float]:
    return {path.name: path.stat().st_mtime for path in report_folder().iterdir()}


def report_folder() -> Path:
    return ROOT / "benchmarks" / "results"


def test_a_dry_run_goes_through_every_part_and_keeps_nothing(tmp_path: Path) -> None:
    before = kept()
    done = run_command("--dry-run", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n  done, ") == len(parts.PARTS)
    assert "not measured" not in done.stdout
    assert "FAILED" not in done.stdout
    assert kept() == before
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_there_is_one_clear_line() -> None:
    done = run_command(CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1
    assert "no GPU" in done.stdout


def test_kinds_of_kernels_run_in_processes_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    context = make_context()
    rows = correctness.in_processes([("gather", "float32"), ("nothing", "float32")], context)
    *gathered, broken = rows
    assert {row["kernel"] for row in gathered} == {"gather_hidden"}
    assert all(row["ok"] for row in gathered)
    assert not broken["ok"]
    assert "process ended with 1: KeyError" in broken["problem"]
    context.deadline = Deadline(-1.0)
    (late,) = correctness.in_processes([("gather", "float32")], context)
    assert not late["ok"]
    assert late["problem"] == "not begun in time"
    assert json.dumps(rows)


def test_every_kernel_and_dtype_is_checked_on_a_gpu() -> None:
    found = correctness.groups(is_dry=False, is_quick=False)
    assert len(found) == len(set(found))
    names = {name for name, _ in found}
    assert {name for name, _ in correctness.groups(is_dry=True, is_quick=False)} == names
    assert ("decode_kv", "float32") in found
    assert ("write_kv8", "float32") not in found


def test_cases_for_a_gpu_can_be_listed_and_are_all_different() -> None:
    lab = Lab(torch.device("cpu"), torch.float16, is_dry=False)
    cases = [
        (check.kernel, check.case)
        for name in ("decode_kv", "decode_kv8", "decode_hidden", "prefill_kv", "write_cache")
        for check in correctness._GROUPS[name](lab)
    ]
    assert len(cases) == len(set(cases))
    assert len(cases) > 60


def test_errors_count_nan_as_equal_to_nan_alone() -> None:
    wanted = torch.tensor([1.0, NAN, 3.0])
    assert error_of(wanted.clone(), wanted) == 0.0
    assert error_of(torch.tensor([1.5, NAN, 3.0]), wanted) == pytest.approx(0.25)
    assert error_of(torch.tensor([1.0, 2.0, 3.0]), wanted) == float("inf")
    assert error_of(torch.tensor([1.0, NAN, NAN]), wanted) == float("inf")
    assert error_of(torch.tensor([1.0]), wanted) == float("inf")
    assert error_of(torch.zeros(0), torch.zeros(0)) == 0.0
    assert num_different(torch.tensor([1, 256]), torch.tensor([1, 257])) == 1.0


def test_a_check_that_breaks_is_a_wrong_one() -> None:
    def broken() -> float:
        raise ValueError("pool: not in one piece\nat all")

    row = Check("write", "float32", 0.1, broken).row()
    assert not row["ok"]
    assert row["problem"] == "ValueError: pool: not in one piece"
    assert not Check("write", "float32", 0.1, lambda: NAN).row()["ok"]
    assert not Check("write", "float32", 0.1, lambda: 0.2).row()["ok"]
    assert Check("write", "float32", 0.1, lambda: 0.1).row()["ok"]


def test_no_part_stops_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(part: Part, context: Context) -> dict[str, Any]:
        context.note(f"seen {part.name}")
        if part.name == "breaks":
            raise RuntimeError("no kernel\nimage")
        if part.name == "lacks":
            raise ModuleNotFoundError("No module named 'numpy'", name="numpy")
        return {"num_failed": int(part.name == "wrong")}

    monkeypatch.setattr(Part, "measure", measure)
    chosen = [
        make_part("breaks"),
        make_part("lacks"),
        make_part("needs", needs=("torch", "no_such_thing", "no.such.thing")),
        make_part("long", least_seconds=1000.0),
        make_part("wrong"),
        make_part("fine"),
    ]
    found = run_parts(chosen, make_context(), 100.0)
    status = {name: result["status"] for name, result in found.items()}
    assert status["breaks"] == "failed: RuntimeError: no kernel"
    assert status["lacks"] == "not run: needs numpy"
    assert status["needs"] == "not run: needs no_such_thing, no.such.thing"
    left = r"not run: \d+ s of the budget are left, it takes 1000 or more"
    assert re.fullmatch(left, status["long"])
    assert status["wrong"] == "failed: 1 wrong or broken"
    assert status["fine"] == "done"
    assert found["fine"]["notes"] == ["seen fine"]
    assert found["needs"]["notes"] == []
    assert has_failed(found)
    assert not has_failed({name: found[name] for name in ("lacks", "needs", "long", "fine")})


def test_a_part_that_breaks_leaves_what_it_had_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(part: Part, context: Context) -> dict[str, Any]:
        if part.name == "second":
            context.found = {"rows": [1, 2]}
            raise RuntimeError("out of memory")
        return {"rows": [3]}

    monkeypatch.setattr(Part, "measure", measure)
    kept: list[dict[str, str]] = []
    found = run_parts(
        [make_part("first"), make_part("second"), make_part("third")],
        make_context(),
        100.0,
        keep=lambda all_: kept.append({name: one["status"] for name, one in all_.items()}),
    )
    assert found["second"]["rows"] == [1, 2]
    assert found["second"]["status"] == "failed: RuntimeError: out of memory"
    assert found["third"]["rows"] == [3]
    assert [list(names) for names in kept] == [
        ["first"],
        ["first", "second"],
        ["first", "second", "third"],
    ]


def test_a_part_apart_tells_the_next_one_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    context = make_context(wrong_kernels={"sample"})
    found = apart.run(next(part for part in parts.PARTS if part.name == "ceilings"), context)
    assert found["status"] == "done"
    assert context.ceilings is not None
    assert context.ceilings.bandwidth == found["copy_bytes_per_second"] > 0
    assert context.wrong_kernels == {"sample"}
    assert json.dumps(found)


LEAVES_SOMETHING = """
import json, os, pathlib, signal, sys, time
json.load(sys.stdin)
told = {"found": {"rows": [7]}, "notes": ["seen"], "wrong_kernels": [], "ceilings": None}
pathlib.Path(sys.argv[1]).write_text(json.dumps(told))
"""


def run_apart(code: str, context: Context, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What comes of a part whose process runs ``code``."""
    command = [sys.executable, "-c", code]
    monkeypatch.setattr(apart, "_command", lambda _, path: [*command, str(path)])
    return apart.run(make_part("any"), context)


@pytest.mark.parametrize(
    ("ends", "problem"),
    [
        ("time.sleep(600)", "not done after 4 s"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "its process ended with -11"),
        ("sys.exit(3)", "its process ended with 3"),
    ],
)
def test_a_part_apart_that_hangs_or_falls_costs_only_itself(
    ends: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "_GRACE_SECONDS", 0.0)
    context = make_context(deadline=Deadline(4.0))
    found = run_apart(LEAVES_SOMETHING + ends, context, monkeypatch)
    assert found == {"status": f"failed: {problem}", "rows": [7]}
    assert context.notes == ["seen"]


def test_a_part_apart_that_falls_at_once_has_found_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = run_apart("raise SystemExit(5)", make_context(), monkeypatch)
    assert found == {"status": "failed: its process ended with 5"}


def test_a_part_has_no_more_than_its_own_time() -> None:
    now = [0.0]
    budget = Deadline(100.0, lambda: now[0])
    part = budget.within(30.0)
    now[0] = 29.0
    assert part.left() == pytest.approx(1.0)
    assert budget.within(100.0).left() == pytest.approx(71.0)
    context = make_context(deadline=part)
    assert context.has_seconds(1.0, "this")
    assert not context.has_seconds(2.0, "that")
    assert context.notes == ["that left out: 1 s left of this part's time"]


def make_row(case: str, seconds: float, **changes: Any) -> dict[str, Any]:
    return {
        "model": "OPT-13B",
        "batch": 32,
        "context": 1024,
        "case": case,
        "seconds": seconds,
        "low_seconds": seconds,
        "high_seconds": seconds,
        "repeats": 5,
        "how": "graph",
        "bytes_per_second": 2e12,
        "flop_per_second": 1e12,
        "share": 0.7,
        "bound": "memory",
        "is_wrong": False,
        **changes,
    }


ROWS = [
    make_row("keys and values", 1e-4),
    make_row("hidden, absorbed", 1.1e-4),
    make_row("hidden, absorbed, with its products", 1.3e-4, is_wrong=True),
    make_row("hidden, re-projected each step (torch)", 2.6e-3, how="calls"),
    {
        "model": "OPT-13B",
        "batch": 32,
        "context": 1024,
        "case": "kv8, int8",
        "problem": "OutOfResources: shared memory",
    },
]


def test_ratios_say_what_was_reached() -> None:
    found = {row["ratio"]: row for row in kernel_times.ratios(ROWS)}
    assert found["hidden over keys and values"]["value"] == pytest.approx(1.1)
    assert found["hidden over keys and values"]["is_reached"]
    assert found["the same with its products"]["is_reached"] is None
    assert found["re-projected over absorbed"]["value"] == pytest.approx(20.0)
    assert found["re-projected over absorbed"]["is_reached"]
    assert not found["keys and values, share of copy"]["is_reached"]
    assert not any("kv8" in name for name in found)


def test_a_row_has_shares_of_what_the_device_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    context = make_context(ceilings=Gpu(1e12, 1e14), wrong_kernels={"decode_kv"})
    context.timer = lambda _: Timing(2e-3, 1e-3, 4e-3, 5, "graph")
    case = kernel_times.Case("kv", kernel_times.Cost(10**9, 0, 10**9), lambda: None, "decode_kv")
    row = kernel_times._row(context, "OPT-13B", kernel_times.OPT_13B, case)
    assert row["share"] == pytest.approx(0.5)
    assert row["bytes_per_second"] == pytest.approx(5e11)
    assert row["bound"] == "memory"
    assert row["is_wrong"]

    def broken(_: object) -> Timing:
        raise RuntimeError("misaligned address")

    context.timer = broken
    row = kernel_times._row(context, "OPT-13B", kernel_times.OPT_13B, case)
    assert row["problem"] == "RuntimeError: misaligned address"


def test_results_are_named_after_the_device_and_can_be_read(tmp_path: Path) -> None:
    common = {"status": "done", "seconds": 1.0, "notes": []}
    wrong = {"kernel": "promote", "case": "all", "max_error": 3.0, "tolerance": 0.1, "ok": False}
    result = {
        "about": {"device": "NVIDIA H100 80GB HBM3", "date": "2026-01-01 00:00", "torch": "2.11"},
        "total_seconds": 12.0,
        "parts": {
            "correctness": {**common, "rows": [wrong], "num_failed": 1},
            "ceilings": {
                **common,
                "copy_bytes_per_second": 3e12,
                "bfloat16_flop_per_second": 8e14,
            },
            "kernels": {**common, "rows": ROWS, "ratios": kernel_times.ratios(ROWS)},
            "end_to_end": {**common, "status": "not run: needs structlog"},
            "goodput": {**common, "notes": ["all of it left out"]},
        },
    }
    name = report.file_name("NVIDIA H100 80GB HBM3", "_quick")
    assert name == "gpu_check_nvidia_h100_80gb_hbm3_quick"
    json_path, page_path = report.write(tmp_path / "new", name, result)
    assert json.loads(json_path.read_text()) == result
    page = page_path.read_text()
    assert "| promote | all | 3 |" in page
    assert "| hidden over keys and values | 1.10 | <= 1.15 | yes |" in page
    assert "**wrong results**" in page
    assert "not as a graph" in page
    assert "OutOfResources" in page
    assert "not run: needs structlog" in page
    assert "- all of it left out" in page


def test_steps_launched_ahead_stand_beside_those_waited_for() -> None:
    where = {"graphs": "auto", "tier": "kv", "batch": 64}
    steps = [
        end_to_end._row(make_context(), where, False, [0.014, 0.013, 0.015], 0.012),
        end_to_end._row(make_context(), where, True, [0.012, 0.0125, 0.011], 0.012),
    ]
    page = "\n".join(report._end_to_end({"steps": steps, "throughput": [], "agreement": {}}))
    assert "| auto | waited for | kv | 64 | 14.00 (13.00 - 15.00) | 4,571 | 14% |" in page
    assert "| auto | ahead | kv | 64 | 12.00 (11.00 - 12.50) | 5,333 | 0% |" in page


def test_settings_of_its_own_are_the_defaults_of_a_worker() -> None:
    theirs, own = WorkerSettings(), vars(stand_ins.engine_settings())
    del own["tiers"]  # a worker finds out what a model has
    assert {name: getattr(theirs, name) for name in own} == own
    with pytest.raises(ValueError, match="no such settings: no_such"):
        stand_ins.engine_settings(no_such=1)
