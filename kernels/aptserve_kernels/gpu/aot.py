"""Compile every shipped kernel for every GPU it is for, without one at hand.

    python -m aptserve_kernels.gpu.aot [--target sm_80] [--only NAME] [--json OUT] [--jobs N]

Fails where a kernel does not compile, asks for more shared memory than a block can have, or spills
registers on sm_80 or sm_90; spills on other targets are listed and no failure. Triton keeps what it
compiled in its cache, so that a second run takes seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import triton
from triton import knobs

from aptserve_kernels.gpu.resources import TARGETS, Resources, compile_variant
from aptserve_kernels.gpu.variants import KernelVariant

MODULES = tuple(
    f"aptserve_kernels.gpu.{name}"
    for name in (
        "write",
        "gather",
        "promote",
        "write_kv8",
        "sample",
        "prefill",
        "decode_kv",
        "decode_hidden",
        "decode_projected",
    )
)
"""Modules whose ``variants()`` list every kernel that ships, each once."""

_TOOL = (
    "Shared memory, bytes per block: Triton's metadata. Registers and spills, bytes per thread: "
    "cuobjdump --dump-resource-usage (its STACK) for sm, the code object's metadata for gfx."
)


@dataclass(frozen=True, slots=True)
class Compilation:
    """One variant for one target; the ``index``-th that the module lists."""

    module: str
    index: int
    kernel: str
    variant: str
    target: str

    @property
    def title(self) -> str:
        return f"{self.kernel} {self.variant}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a compilation. ``resources`` is None where there is only an error.

    ``cpu_seconds`` include those of ptxas, and do not depend on what else the machine is doing.
    """

    resources: Resources | None
    problems: list[str]
    cpu_seconds: float


def list_compilations(
    modules: Sequence[str], targets: Sequence[str], only: Sequence[str]
) -> list[Compilation]:
    """All compilations whose title contains one of ``only``; all titles if that is empty."""
    found = [
        Compilation(module, index, variant.kernel.__name__, variant.name, target)
        for module in modules
        for index, variant in enumerate(_variants(module))
        for target in variant.targets
        if target in targets
    ]
    return [c for c in found if not only or any(part in c.title for part in only)]


def run_compilation(compilation: Compilation) -> Verdict:
    """Compile and judge. What the compiler throws is a problem like any other."""
    variant = _variants(compilation.module)[compilation.index]
    target = TARGETS[compilation.target]
    started = _cpu_seconds()
    # Triton prints the whole assembly when ptxas refuses it.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            resources = compile_variant(variant, target)
        except Exception as error:
            return Verdict(None, [_summary(error)], _cpu_seconds() - started)
    return Verdict(resources, resources.problems(target), _cpu_seconds() - started)


def _cpu_seconds() -> float:
    """Of this process and of those it started."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@cache
def _variants(module: str) -> tuple[KernelVariant, ...]:
    return tuple(importlib.import_module(module).variants())


def _summary(error: Exception) -> str:
    """The line of an error that says most: that of ptxas, or what follows the source it quotes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    of_ptxas = [line for line in lines if line.startswith("ptxas fatal")]
    telling = [*lines, *of_ptxas[:1]][-1] if lines else ""
    return textwrap.shorten(f"{type(error).__name__}: {telling}", 200, placeholder=" ...")


def _verdicts(
    compilations: Sequence[Compilation], jobs: int
) -> Iterator[tuple[Compilation, Verdict]]:
    """In the given order, each as soon as it and those before it are there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "triton"])
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = [pool.submit(run_compilation, c) for c in compilations]
        for compilation, future in zip(compilations, futures, strict=True):
            yield compilation, _result(future)


def _result(future: Future[Verdict]) -> Verdict:
    try:
        return future.result()
    except BrokenExecutor:
        return Verdict(None, ["not compiled: a compiling process died"], 0.0)


def _line(width: int, *cells: str) -> str:
    title, target, *numbers = cells
    return f"{title:<{width}}  {target:<6}" + "".join(f"  {cell:>9}" for cell in numbers)


def _report(width: int, compilation: Compilation, verdict: Verdict) -> str:
    seconds = f"{verdict.cpu_seconds:.2f}"
    if verdict.resources is None:
        cells = ["-", "-", "-", seconds]
    else:
        r = verdict.resources
        cells = [str(r.registers), str(r.shared_bytes), str(r.spill_bytes), seconds]
    line = _line(width, compilation.title, compilation.target, *cells)
    return line + "  FAILED" * bool(verdict.problems)


def _check(compilations: Sequence[Compilation], jobs: int) -> list[tuple[Compilation, Verdict]]:
    """Compile all, with a line on the screen for each."""
    width = max(len(c.title) for c in compilations)
    print(_line(width, "variant", "target", "registers", "shared", "spills", "CPU s"))
    done = []
    for compilation, verdict in _verdicts(compilations, jobs):
        print(_report(width, compilation, verdict), flush=True)
        done.append((compilation, verdict))
    return done


def _as_json(done: Sequence[tuple[Compilation, Verdict]]) -> str:
    rows = []
    for compilation, verdict in done:
        row = {**asdict(compilation), **asdict(verdict), **(asdict(verdict)["resources"] or {})}
        rows.append({k: v for k, v in row.items() if k not in ("index", "resources")})
    limits = {name: {"max_shared_bytes": t.max_shared_bytes} for name, t in TARGETS.items()}
    return json.dumps(
        {"triton": triton.__version__, "read_with": _TOOL, "targets": limits, "variants": rows},
        indent=2,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m aptserve_kernels.gpu.aot", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--target", action="append", choices=tuple(TARGETS), help="this one (repeatable)"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="names with this (repeatable)"
    )
    parser.add_argument(
        "--module",
        action="append",
        help="a module with variants(), instead of those shipped (repeatable)",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the table there, too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    return parser


def main() -> int:
    """Command line; the exit status is 1 if anything failed."""
    parser = _parser()
    arguments = parser.parse_args()
    if knobs.runtime.interpret:
        parser.error(
            "TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it"
        )
    compilations = list_compilations(
        arguments.module or MODULES, arguments.target or tuple(TARGETS), arguments.only
    )
    if not compilations:
        parser.error("no variant of that name for these targets")
    print(_TOOL)
    started = time.perf_counter()
    done = _check(compilations, arguments.jobs)
    if arguments.json:
        arguments.json.write_text(_as_json(done) + "\n")
    failed = [(c, problem) for c, verdict in done for problem in verdict.problems]
    seconds, cpu_seconds = time.perf_counter() - started, sum(v.cpu_seconds for _, v in done)
    print(f"{len(done)} compilations in {seconds:.0f} s, {cpu_seconds:.0f} s of CPU")
    for compilation, problem in failed:
        print(f"FAILED {compilation.title}, {compilation.target}: {problem}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
