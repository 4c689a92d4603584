"""Command line: ``python -m benchmarks.gpu_check``, also as ``make gpu-check``.

Ends with 0 if all went well, with 1 if a kernel is wrong or a part broke, and with 2 if there is
nothing to check.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_RESULTS = Path(__file__).parents[1] / "results"
_PART_NAMES = ("correctness", "ceilings", "kernels", "end_to_end", "goodput")
_BUDGET_SECONDS = 480.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, say what they find as they go, and keep it."""
    options = _parse(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        import torch
    except ModuleNotFoundError:
        print("gpu-check: this Python has no torch; PYTHON=... names another to make")
        return 2
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU here; --dry-run tries the check itself on a CPU")
        return 2
    return _check(options)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__)
    parser.add_argument("--out", type=Path, help=f"folder of the results (default: {_RESULTS})")
    parser.add_argument("--only", choices=_PART_NAMES, action="append", help="part to run")
    parser.add_argument("--quick", action="store_true", help="one dtype and fewer shapes")
    parser.add_argument(
        "--budget", type=float, default=_BUDGET_SECONDS, help="seconds (default: %(default)g)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny sizes on a CPU; nothing is kept"
    )
    return parser.parse_args(arguments)


def _check(options: argparse.Namespace) -> int:
    import torch

    from benchmarks.gpu_check import apart
    from benchmarks.gpu_check.context import Context, Deadline
    from benchmarks.gpu_check.parts import PARTS, has_failed, run_parts
    from benchmarks.gpu_check.report import describe_device
    from benchmarks.gpu_check.timing import ClockTimer

    started = time.monotonic()
    device = torch.device("cpu" if options.dry_run else "cuda:0")
    context = Context(
        device=device,
        timer=ClockTimer(),  # of this process, which times nothing on a GPU
        deadline=Deadline(options.budget),
        is_dry=options.dry_run,
        is_quick=options.quick,
    )
    about = describe_device(device)
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    parts = [part for part in PARTS if not options.only or part.name in options.only]
    paths: list[Path] = []

    def keep(found: dict[str, Any]) -> None:
        total = time.monotonic() - started
        paths[:] = _keep(options, {"about": about, "total_seconds": total, "parts": found})

    run = None if options.dry_run else apart.run
    found = run_parts(parts, context, options.budget, run=run, keep=keep)
    print(f"\n{time.monotonic() - started:.0f} s", flush=True)
    for path in paths:
        print(f"wrote {path}")
    if options.dry_run:
        print("A dry run: nothing above is a result, and nothing is kept.")
    return 1 if has_failed(found) else 0


def _keep(options: argparse.Namespace, result: dict[str, Any]) -> list[Path]:
    """Write the files. Some parts alone get a name of their own; a dry run is only laid out."""
    from benchmarks.gpu_check.report import file_name, markdown, write

    if options.dry_run:
        markdown(result)
        return []
    suffix = "".join(f"_{name}" for name in options.only or ()) + "_quick" * options.quick
    return write(options.out or _RESULTS, file_name(result["about"]["device"], suffix), result)


if __name__ == "__main__":
    sys.exit(main())
