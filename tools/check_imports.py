#!/usr/bin/env python3
"""Keeps the packages apart: every import must be one that its place may have.

An integrator installs the SDK without torch, the same scheduler core runs live and simulated, and
kernels know nothing of the service. Each rule says where code that breaks it belongs.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_STDLIB = sys.stdlib_module_names
_IO_MODULES = frozenset(
    {"asyncio", "concurrent", "http", "multiprocessing", "os", "pathlib", "select", "selectors"}
    | {"signal", "socket", "socketserver", "ssl", "subprocess", "threading", "urllib"}
)
_CLOCK_MODULES = frozenset({"datetime", "time"})
_MODEL_LIBRARIES = frozenset({"torch", "transformers", "triton", "aptserve_kernels"})


@dataclass(frozen=True)
class Import:
    """One imported module. ``lazy``: inside a function, or for types alone, so it costs nothing."""

    module: str
    line: int
    lazy: bool


@dataclass(frozen=True)
class Rule:
    """What files under ``folder`` may import; names cover their submodules.

    With ``allowed`` set, everything else outside the standard library is refused. ``forbidden``
    is refused in any case. ``lazy_only`` is allowed inside functions alone.
    """

    folder: str
    advice: str
    allowed: frozenset[str] | None = None
    forbidden: frozenset[str] = frozenset()
    lazy_only: frozenset[str] = frozenset()
    excluding: tuple[str, ...] = ()

    def covers(self, path: str) -> bool:
        """Whether the rule is for this file, a path from the repository's root."""
        return path.startswith(self.folder) and not path.startswith(self.excluding)

    def permits(self, found: Import) -> bool:
        """Whether a file under the rule may have this import."""
        if _is_within(found.module, self.forbidden):
            return False
        if _is_within(found.module, self.lazy_only):
            return found.lazy
        if self.allowed is None or _is_within(found.module, self.allowed):
            return True
        return found.module.partition(".")[0] in _STDLIB


RULES = (
    Rule(
        folder="client/aptserve/",
        excluding=(
            "client/aptserve/cli/",
            "client/aptserve/evaluation/",
            "client/aptserve/workload/",
        ),
        allowed=frozenset({"aptserve", "google", "grpc", "grpc_status"}),
        forbidden=frozenset({"aptserve.cli"}),
        advice="the SDK needs only grpcio and protobuf; what the command line needs belongs in "
        "client/aptserve/cli, what a service needs in its own package",
    ),
    Rule(
        folder="client/aptserve/workload/",
        allowed=frozenset({"aptserve.workload", "numpy"}),
        advice="workloads are numbers: what talks to a service belongs in the SDK or the command "
        "line around them",
    ),
    Rule(
        folder="client/aptserve/evaluation/",
        allowed=frozenset({"aptserve.evaluation", "numpy"}),
        lazy_only=frozenset({"scipy", "matplotlib"}),
        advice="reports and figures are made of records: what plays a workload belongs elsewhere",
    ),
    Rule(
        folder="client/aptserve/cli/",
        allowed=frozenset({"aptserve", "google", "grpc", "grpc_health", "rich", "typer"}),
        lazy_only=frozenset({"aptserve_scheduler", "aptserve_worker", "numpy"}),
        advice="the command line starts without the services installed: import a service inside "
        "the function that runs it, and put service code into that service's package",
    ),
    Rule(
        folder="scheduler_svc/aptserve_scheduler/",
        forbidden=_MODEL_LIBRARIES | {"aptserve_worker", "aptserve.cli"},
        advice="the scheduler runs without a model; what touches tensors belongs in gpu_worker, "
        "and what both sides need in protos/",
    ),
    *(
        Rule(
            folder=f"scheduler_svc/aptserve_scheduler/{name}/",
            allowed=frozenset({"numpy"})
            | {f"aptserve_scheduler.{part}" for part in ("arrays", "core", "policies")},
            forbidden=_IO_MODULES | _CLOCK_MODULES,
            lazy_only=frozenset({"scipy"}),
            advice="core/ and policies/ do no I/O and read no clock, so that they run live and "
            "simulated alike: gRPC, tasks and time belong in the service around them",
        )
        for name in ("core", "policies")
    ),
    Rule(
        folder="gpu_worker/aptserve_worker/",
        forbidden=frozenset({"aptserve_scheduler", "aptserve.cli"}),
        advice="a worker knows its scheduler by protos/ alone; composing batches belongs in "
        "scheduler_svc",
    ),
    Rule(
        folder="kernels/aptserve_kernels/",
        allowed=frozenset({"aptserve_kernels", "numpy", "torch", "triton"}),
        advice="kernels work on tensors and know nothing of the service; code with a model or a "
        "request in it belongs in gpu_worker",
    ),
)


def find_imports(source: str, module: str) -> Iterator[Import]:
    """Every import of a file; ``module`` is its dotted name, by which relative ones resolve."""
    pending: list[tuple[ast.AST, bool]] = [(ast.parse(source), False)]
    while pending:
        node, lazy = pending.pop()
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        lazy = lazy or _is_for_types_only(node)
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _resolve(node, module)
            # `from aptserve import cli` may import aptserve.cli; names of no module do no harm.
            yield from (Import(f"{base}.{a.name}", node.lineno, lazy) for a in node.names)
        pending.extend((child, lazy) for child in ast.iter_child_nodes(node))


def _is_for_types_only(node: ast.AST) -> bool:
    """``if TYPE_CHECKING:``, which never runs."""
    test = node.test if isinstance(node, ast.If) else None
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def violations(root: Path) -> Iterator[str]:
    """One line for each import under ``root`` that breaks a rule."""
    folders = sorted({rule.folder.split("/")[0] for rule in RULES})
    for path in (p for folder in folders for p in sorted((root / folder).rglob("*.py"))):
        name = path.relative_to(root).as_posix()
        rules = [rule for rule in RULES if rule.covers(name)]
        for found in find_imports(path.read_text(encoding="utf-8"), _module_name(name)):
            for rule in rules:
                if not rule.permits(found):
                    where = "at module level " if _is_within(found.module, rule.lazy_only) else ""
                    yield f"{name}:{found.line}: imports {found.module} {where}- {rule.advice}"


def main(arguments: list[str]) -> int:
    """Check the repository, or the folder given; 1 when a rule is broken."""
    root = Path(arguments[0]) if arguments else Path(__file__).resolve().parent.parent
    found = list(violations(root))
    for line in found:
        print(line, file=sys.stderr)
    if not found:
        print("imports: all within the rules")
    return 1 if found else 0


def _is_within(module: str, names: frozenset[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def _module_name(path: str) -> str:
    """``client/aptserve/cli/app.py`` is ``aptserve.cli.app``; a package keeps its ``__init__``."""
    return path.removesuffix(".py").partition("/")[2].replace("/", ".")


def _resolve(node: ast.ImportFrom, module: str) -> str:
    if not node.level:
        return node.module or ""
    package = module.split(".")[: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
