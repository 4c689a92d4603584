"""The parts of the check, and running them one after the other within a budget of time."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.gpu_check import stand_ins
from benchmarks.gpu_check.context import Context, Deadline

_ENGINE = ("numpy", "transformers", "safetensors")


@dataclass(frozen=True, slots=True)
class Part:
    """A module of this package that has ``measure(context)``.

    ``needs``: imports without which it cannot run. It is not begun with less than
    ``least_seconds`` left, and ends what it does after ``most_seconds``.
    """

    name: str
    title: str
    needs: tuple[str, ...]
    least_seconds: float
    most_seconds: float

    def measure(self, context: Context) -> dict[str, Any]:
        """Run it; imported only now, so that what it lacks stops nothing else."""
        stand_ins.install()
        module = import_module(f"benchmarks.gpu_check.{_MODULES.get(self.name, self.name)}")
        result: dict[str, Any] = module.measure(context)
        return result


_MODULES = {"kernels": "kernel_times"}

PARTS = (
    Part("correctness", "Kernels against their torch twins", ("triton",), 30, 200),
    Part("ceilings", "What the device reaches", ("triton",), 5, 20),
    Part("kernels", "Kernels timed", ("triton",), 20, 120),
    Part("end_to_end", "A model of OPT-13B's shape", _ENGINE, 50, 150),
    Part(
        "goodput",
        "Attainment in a pool that is too small",
        _ENGINE,
        60,
        150,
    ),
)
"""The most important first: a budget that is too small cuts the end."""

DONE, FAILED = "done", "failed"


def run_parts(
    parts: Sequence[Part],
    context: Context,
    budget_seconds: float,
    has: Callable[[str], bool] | None = None,
    run: Callable[[Part, Context], dict[str, Any]] | None = None,
    keep: Callable[[dict[str, dict[str, Any]]], None] = lambda _: None,
) -> dict[str, dict[str, Any]]:
    """What each part found, by name, with ``status``, ``seconds`` and ``notes``.

    ``status``: ``done``, ``failed: ...`` or ``not run: ...``. No failure stops the next part.
    ``run`` does a part, :func:`run_here` unless told; ``keep`` is given all results after each.
    """
    has, run = has or is_there, run or run_here
    budget = Deadline(budget_seconds)
    found = {}
    for part in parts:
        context.say(f"\n{part.title}")
        lacking = [name for name in part.needs if not has(name)]
        result: dict[str, Any]
        context.notes, context.found = [], {}
        started = time.monotonic()
        if lacking:
            result = {"status": f"not run: needs {', '.join(lacking)}"}
        elif budget.left() < part.least_seconds:
            result = {
                "status": f"not run: {max(budget.left(), 0):.0f} s of the budget are left, "
                f"it takes {part.least_seconds:g} or more"
            }
        else:
            context.deadline = budget.within(part.most_seconds)
            result = run(part, context)
        result["seconds"] = time.monotonic() - started
        result["notes"] = context.notes
        context.say(f"  {result['status']}, {result['seconds']:.1f} s")
        found[part.name] = result
        keep(found)
    return found


def run_here(part: Part, context: Context) -> dict[str, Any]:
    """What the part found, and its ``status``; of one that broke, what it had found until then."""
    try:
        found = part.measure(context)
        num_failed = found.get("num_failed", 0)
        result = {"status": f"{FAILED}: {num_failed} wrong or broken" if num_failed else DONE}
        result |= found
    except ModuleNotFoundError as problem:
        result = {"status": f"not run: needs {problem.name}"}
    except Exception as problem:
        context.say(traceback.format_exc())
        text = (str(problem) or "?").strip().splitlines()[0][:300]
        result = {"status": f"{FAILED}: {type(problem).__name__}: {text}"} | context.found
    gc.collect()
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
    return result


def has_failed(found: dict[str, dict[str, Any]]) -> bool:
    """Whether a kernel is wrong or a part broke; what was not run does not count."""
    return any(result["status"].startswith(FAILED) for result in found.values())


def is_there(module: str) -> bool:
    """Whether it can be imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False
