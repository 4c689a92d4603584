"""Run the study and write docs/study from what it found."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from aptserve.evaluation import Evaluation, RunReport
from aptserve.evaluation.files import load_evaluation, save_evaluation

from benchmarks.study import extremes, report
from benchmarks.study.cells import WORKLOADS, factorial
from benchmarks.study.runs import around_goodput, evaluation_of, in_processes

FOLDER = Path(__file__).parent.parent.parent / "docs" / "study"
Jobs = list[partial[list[RunReport]]]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description="Compares schedulers on simulated GPUs; takes about two hours of one core. "
        "Cells that a file has already are not run again.",
    )
    parser.add_argument("--requests", type=int, default=400, help="of a run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--only", choices=sorted(PARTS), action="append", help="(repeatable)")
    parser.add_argument("--policy", action="append", help="these alone (repeatable)")
    parser.add_argument("--report-only", action="store_true", help="write the report alone")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="(default: %(default)s)")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if not arguments.report_only:
        for name in arguments.only or PARTS:
            jobs = PARTS[name](arguments.requests, tuple(range(arguments.seeds)))
            if arguments.policy:
                jobs = [job for job in jobs if job.args[0].policy in arguments.policy]
            _run(name, jobs, arguments.jobs, arguments.folder / f"{name}.json")
    report.write(arguments.folder)


def _factorial(workload_name: str, num_requests: int, seeds: tuple[int, ...]) -> Jobs:
    workload = next(w for w in WORKLOADS if w.name == workload_name)
    return [
        partial(around_goodput, spec, workload.rates, workload.start, seeds)
        for spec in factorial(workload, num_requests)
    ]


PARTS: dict[str, Callable[[int, tuple[int, ...]], Jobs]] = {
    **{workload.name: partial(_factorial, workload.name) for workload in WORKLOADS},
    "overload": extremes.overload_jobs,
    "no_gain": extremes.no_gain_jobs,
    "long_run": extremes.long_run_jobs,
    "optimum": extremes.optimum_jobs,
}


def _run(name: str, jobs: Jobs, num_processes: int, path: Path) -> None:
    runs: list[RunReport] = list(load_evaluation(path).runs) if path.exists() else []
    known = {run.cell for run in runs}
    jobs = [job for job in jobs if job.args[0].cell() not in known]
    started, num_done = time.monotonic(), 0

    def take(done: list[RunReport]) -> None:
        nonlocal num_done
        num_done += 1
        runs.extend(done)
        has_goodputs = name not in extremes.PARTS
        save_evaluation(evaluation_of(runs) if has_goodputs else Evaluation(tuple(runs)), path)
        cell = done[0].cell
        print(
            f"{name} {num_done}/{len(jobs)} {time.monotonic() - started:5.0f} s  "
            f"{cell.system}, CV {cell.cv:g}, {cell.policy}: {len(done)} runs",
            flush=True,
        )

    in_processes(jobs, num_processes, take)


if __name__ == "__main__":
    main()
