"""The ahead-of-time check: its verdicts on kernels made for it, and all that ship."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aptserve_kernels.gpu
import pytest
from aptserve_kernels.gpu.aot import MODULES, list_compilations
from aptserve_kernels.gpu.resources import TARGETS, Resources
from aptserve_kernels.gpu.variants import TARGETS as TARGET_NAMES

KERNEL = """
import triton
import triton.language as tl

from aptserve_kernels.gpu.variants import KernelVariant


@triton.jit
def product(a, b, out, depth, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, depth, K):
        inner = start + tl.arange(0, K)
        x = tl.load(a + rows[:, None] * depth + inner[None, :])
        y = tl.load(b + inner[:, None] * N + columns[None, :])
        total = tl.dot(x, y, total)
    tl.store(out + rows[:, None] * N + columns[None, :], total)


def variant(name, m, n, k, depth="i32:16", **options):
    signature = {"a": "*bf16", "b": "*bf16", "out": "*fp32", "depth": depth}
    return KernelVariant(name, product, signature, {"M": m, "N": n, "K": k}, **options)


def variants():
    yield variant("fine", 32, 32, 32)
    yield variant("divided", 64, 128, 64, num_stages=3)
    yield variant("whatever", 64, 128, 64, num_stages=3, depth="i32")
    yield variant("deep", 128, 128, 128, num_warps=8, num_stages=4)
    yield variant("cramped", 128, 128, 64, num_warps=1, targets=("sm_80", "sm_100"))
    yield variant("misnamed", 32, 32, 32, depth="i32:8", targets=("sm_80",))
    yield KernelVariant("partial", product, {"a": "*bf16"}, {"M": 16}, targets=("sm_80",))
    yield variant("refused", 32, 32, 24, targets=("sm_80",))
"""


@dataclass(frozen=True)
class Checked:
    """What a check said: its exit status, rows by variant and target, and the failures listed."""

    status: int
    rows: dict[tuple[str, str], dict[str, Any]]
    errors: list[str]

    def errors_of(self, variant: str) -> list[str]:
        return [line for line in self.errors if line.startswith(f"FAILED product {variant}, ")]


def run_check(
    *arguments: str, folder: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= variables | ({"PYTHONPATH": str(folder)} if folder else {})
    command = [sys.executable, "-m", "aptserve_kernels.gpu.aot", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def own_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the module ``own_kernels``."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "own_kernels.py").write_text(KERNEL)
    return folder


@pytest.fixture(scope="module")
def checked(own_kernels: Path) -> Checked:
    """The verdicts on all of them."""
    out = own_kernels / "verdicts.json"
    arguments = ("--module", "own_kernels", "--json", str(out), "--jobs", "2")
    done = run_check(*arguments, folder=own_kernels)
    rows = json.loads(out.read_text())["variants"]
    by_name = {(row["variant"], row["target"]): row for row in rows}
    return Checked(done.returncode, by_name, done.stderr.splitlines())


def test_a_kernel_that_fits_passes_on_every_target(checked: Checked) -> None:
    assert {target for variant, target in checked.rows if variant == "fine"} == set(TARGETS)
    for name, target in TARGETS.items():
        row = checked.rows["fine", name]
        assert row["problems"] == []
        assert row["registers"] > 0
        assert 0 < row["shared_bytes"] <= target.max_shared_bytes
        assert row["spill_bytes"] == 0 or target.may_spill
    assert checked.errors_of("fine") == []


def test_too_much_shared_memory_fails_where_it_is_too_much(checked: Checked) -> None:
    assert len(checked.errors_of("deep")) == len(TARGETS)
    for name, target in TARGETS.items():
        row = checked.rows["deep", name]
        assert row["shared_bytes"] > target.max_shared_bytes
        (problem,) = row["problems"]
        assert problem.startswith(f"{row['shared_bytes']} bytes of shared memory")
        assert f"FAILED product deep, {name}: {problem}" in checked.errors


def test_spills_fail_where_they_may_not_be(checked: Checked) -> None:
    spilled = checked.rows["cramped", "sm_80"]["spill_bytes"]
    assert spilled > 0
    assert checked.errors_of("cramped") == [
        f"FAILED product cramped, sm_80: {spilled} bytes spilled per thread"
    ]
    assert checked.rows["cramped", "sm_100"]["spill_bytes"] > 0
    assert checked.rows["cramped", "sm_100"]["problems"] == []


def test_only_the_targets_of_a_variant_are_compiled(checked: Checked) -> None:
    assert {target for variant, target in checked.rows if variant == "cramped"} == {
        "sm_80",
        "sm_100",
    }


def test_what_cannot_be_compiled_fails_in_one_line(checked: Checked) -> None:
    for name, says in (
        ("misnamed", "divisible by 16 or not at all"),
        ("partial", "['K', 'N', 'b', 'depth', 'out']"),
        ("refused", "power of 2"),
    ):
        (line,) = checked.errors_of(name)
        assert says in line
        assert checked.rows[name, "sm_80"]["problems"][0] in line


def test_divisible_integers_are_compiled_as_such(checked: Checked) -> None:
    divided, whatever = (checked.rows[name, "sm_80"] for name in ("divided", "whatever"))
    # Only whole vectors of A can be copied to shared memory asynchronously.
    assert divided["shared_bytes"] > whatever["shared_bytes"]


def test_failures_set_the_exit_status(own_kernels: Path, checked: Checked) -> None:
    assert checked.status == 1
    arguments = ("--only", "fine", "--target", "sm_80", "--target", "sm_90")
    done = run_check("--module", "own_kernels", *arguments, folder=own_kernels)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 compilations" in done.stdout


def test_it_refuses_to_interpret() -> None:
    done = run_check(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr


def test_a_name_that_matches_nothing_is_an_error(own_kernels: Path) -> None:
    done = run_check("--module", "own_kernels", "--only", "nothing", folder=own_kernels)
    assert done.returncode == 2
    assert "no variant of that name" in done.stderr


def test_tensor_memory_is_limited() -> None:
    asked = Resources(registers=32, shared_bytes=0, spill_bytes=0, tensor_columns=1024)
    (problem,) = asked.problems(TARGETS["sm_100"])
    assert "tensor memory" in problem


def test_every_target_has_limits() -> None:
    assert set(TARGETS) == set(TARGET_NAMES)


def shipped_kernels() -> set[str]:
    """Names of the package's jit functions that no other jit function uses."""
    (folder,) = map(Path, aptserve_kernels.gpu.__path__)
    nodes = [n for path in folder.glob("*.py") for n in ast.walk(ast.parse(path.read_text()))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    jitted = [f for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)]
    inner = [node for f in jitted for statement in f.body for node in ast.walk(statement)]
    used = {node.id for node in inner if isinstance(node, ast.Name)}
    return {f.name for f in jitted} - used


def test_every_kernel_is_listed() -> None:
    listed = list_compilations(MODULES, tuple(TARGETS), only=[])
    assert {c.kernel for c in listed} == shipped_kernels()
    names = [(c.kernel, c.variant, c.target) for c in listed]
    assert len(names) == len(set(names))


@pytest.mark.timeout(1200)
def test_everything_that_ships_compiles_and_fits() -> None:
    done = run_check()
    assert done.returncode == 0, done.stderr
