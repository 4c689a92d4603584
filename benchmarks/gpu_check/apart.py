"""A part in a process of its own.

A kernel that faults takes the device context of its process with it, one that never ends holds it,
and what a part leaves in memory lacks the next one. All of that ends with the process. It writes
what it has found whenever it says something, so that one that is ended leaves that behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from aptserve_kernels.costs import Gpu

from benchmarks.gpu_check.context import Context, Deadline
from benchmarks.gpu_check.timing import ClockTimer, EventTimer

if TYPE_CHECKING:
    from benchmarks.gpu_check.parts import Part

_GRACE_SECONDS = 25.0
"""For the start of the process, and for the case under way when its time is over."""


def run(part: Part, context: Context) -> dict[str, Any]:
    """As :func:`benchmarks.gpu_check.parts.run_here`, but nothing that happens there comes here."""
    limit = context.deadline.left() + _GRACE_SECONDS
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        path = Path(folder) / "found.json"
        problem = _run_process(_command(part.name, path), json.dumps(_asked(context)), limit)
        if not path.exists():
            return {"status": f"failed: {problem or 'its process found nothing'}"}
        told = json.loads(path.read_text())
    context.notes += told["notes"]
    context.wrong_kernels |= set(told["wrong_kernels"])
    if told["ceilings"] is not None:
        context.ceilings = Gpu(**told["ceilings"])
    found: dict[str, Any] = told["found"]
    # Without an end of its own: it was ended, or fell.
    return {"status": f"failed: {problem or 'it did not end'}"} | found


def _command(name: str, path: Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_check.apart", name, str(path)]


def _run_process(command: Sequence[str], asked: str, limit_seconds: float) -> str | None:
    """What went wrong with it, if anything. It and all it has started are gone afterwards."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)
    try:
        process.communicate(asked, timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        return f"not done after {limit_seconds:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"its process ended with {process.returncode}" if process.returncode else None


def _asked(context: Context) -> dict[str, Any]:
    return {
        "device": str(context.device),
        "seconds": context.deadline.left(),
        "is_dry": context.is_dry,
        "is_quick": context.is_quick,
        **_shared(context),
    }


def _shared(context: Context) -> dict[str, Any]:
    """What one part tells the next."""
    return {
        "wrong_kernels": sorted(context.wrong_kernels),
        "ceilings": None if context.ceilings is None else asdict(context.ceilings),
    }


def _context(asked: dict[str, Any]) -> Context:
    device = torch.device(asked["device"])
    return Context(
        device=device,
        timer=ClockTimer() if device.type == "cpu" else EventTimer(device),
        deadline=Deadline(asked["seconds"]),
        is_dry=asked["is_dry"],
        is_quick=asked["is_quick"],
        ceilings=None if asked["ceilings"] is None else Gpu(**asked["ceilings"]),
        wrong_kernels=set(asked["wrong_kernels"]),
    )


def main(arguments: Sequence[str]) -> None:
    """Name of a part and where to write; what it is to know comes as JSON on standard input."""
    from benchmarks.gpu_check.parts import PARTS, run_here

    name, path = arguments[0], Path(arguments[1])
    context = _context(json.load(sys.stdin))
    say = context.say

    def keep(found: dict[str, Any]) -> None:
        told = {"found": found, "notes": context.notes, **_shared(context)}
        unfinished = path.with_suffix(".new")
        unfinished.write_text(json.dumps(told))
        unfinished.replace(path)

    def say_and_keep(text: str) -> None:
        say(text)
        keep(context.found)

    context.say = say_and_keep
    keep(run_here(next(part for part in PARTS if part.name == name), context))


if __name__ == "__main__":
    main(sys.argv[1:])
