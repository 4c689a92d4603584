"""Run the benchmarks, keep their results, and write the README's tables from them."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import (
    cpu_engines,
    decision_time,
    fidelity,
    hidden_attention,
    kv8_quality,
    live_policies,
    serving,
    simulation,
    step_breakdown,
)
from benchmarks.tables import section, update_readme

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

BENCHMARKS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "decision_time": lambda _: decision_time.measure(),
    "hidden_attention": lambda _: hidden_attention.measure(),
    "kv8_quality": lambda _: kv8_quality.measure(),
    "step_breakdown": step_breakdown.measure,
    "serving": serving.measure,
    "cpu_engines": cpu_engines.measure,
    "simulation": lambda _: simulation.measure(),
    "fidelity": fidelity.measure,
    "live_policies": live_policies.measure,
}
QUICK: dict[str, Callable[[Path], dict[str, Any]]] = {
    "fidelity": lambda folder: fidelity.measure(folder, quick=True),
    "live_policies": lambda folder: live_policies.measure(folder, quick=True),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures on this machine's CPU; takes about half an hour. Keep it idle.",
    )
    parser.add_argument(
        "--only", choices=sorted(BENCHMARKS), action="append", help="run this one (repeatable)"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        help="folder of the JSON files (default: %(default)s)",
    )
    parser.add_argument(
        "--tables-only", action="store_true", help="write the README's tables from kept results"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"a short run of {' and '.join(QUICK)}: its table is printed and nothing is kept",
    )
    arguments = parser.parse_args()
    if arguments.quick:
        _run_quick(parser, arguments.only or list(QUICK))
        return
    arguments.results.mkdir(parents=True, exist_ok=True)
    if not arguments.tables_only:
        with tempfile.TemporaryDirectory() as folder:
            for name in arguments.only or BENCHMARKS:
                print(f"{name} …", flush=True)
                result = BENCHMARKS[name](Path(folder))
                path = arguments.results / f"cpu_{name}.json"
                path.write_text(json.dumps(result, indent=2) + "\n")
                print(f"  {path}", flush=True)
    if arguments.results.resolve() == RESULTS:
        update_readme(ROOT / "README.md", RESULTS)


def _run_quick(parser: argparse.ArgumentParser, names: list[str]) -> None:
    if not set(names) <= set(QUICK):
        parser.error(f"--quick: only {' and '.join(QUICK)} have a short run")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            print(f"{name} …", flush=True)
            print(section(name, QUICK[name](Path(folder))), flush=True)


if __name__ == "__main__":
    main()
