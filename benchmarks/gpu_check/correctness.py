"""Every kernel against its torch twin, each kind and dtype in a process of its own.

A kernel that crashes takes its process's device context with it and no other, and compiling, which
is most of the time, happens side by side.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.gpu_check import cases_attention, cases_memory, cases_sampling
from benchmarks.gpu_check.context import Context, Deadline
from benchmarks.gpu_check.lab import Checks, Lab

Group = tuple[str, str]
"""Name and dtype."""

_GROUPS: dict[str, Callable[[Lab], Checks]] = {
    "decode_kv": cases_attention.decode_kv,
    "decode_hidden": cases_attention.decode_hidden,
    "decode_projected": cases_attention.decode_projected,
    "prefill_kv": cases_attention.prefill_kv,
    "attend_ragged": cases_attention.attend_ragged,
    "write_cache": cases_memory.write_cache,
    "gather": cases_memory.gather,
    "promote": cases_memory.promote,
    "sample": cases_sampling.sample,
    "decode_kv8": cases_attention.decode_kv8,
    "prefill_kv8": cases_attention.prefill_kv8,
    "write_kv8": cases_memory.write_kv8,
}
_OF_16_BITS = ("decode_kv8", "prefill_kv8", "write_kv8")
_OF_FLOAT32 = ("sample",)
_MOST_PROCESSES = 10


def groups(*, is_dry: bool, is_quick: bool) -> list[Group]:
    """What to run. Under an interpreter float32, whose products it computes; codes need 16 bits."""
    if is_dry:
        return [(name, "float16" if name in _OF_16_BITS else "float32") for name in _GROUPS]
    dtypes = ("bfloat16",) if is_quick else ("bfloat16", "float16", "float32")
    found = []
    for dtype in dtypes:
        for name in _GROUPS:
            if name in _OF_FLOAT32 or (name in _OF_16_BITS and dtype == "float32"):
                continue
            found.append((name, dtype))
    return [*found, *((name, "float32") for name in _OF_FLOAT32)]


def measure(context: Context) -> dict[str, Any]:
    """Rows ``{kernel, case, max_error, tolerance, ok}``, those that failed said as they come."""
    wanted = groups(is_dry=context.is_dry, is_quick=context.is_quick)
    run = _in_turn if context.is_dry else in_processes
    rows = run(wanted, context)
    failed = [row for row in rows if not row["ok"]]
    context.wrong_kernels |= {row["kernel"] for row in failed}
    context.say(f"  {len(rows) - len(failed)} of {len(rows)} cases right")
    return {"rows": rows, "num_failed": len(failed)}


def _in_turn(wanted: Sequence[Group], context: Context) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    context.found = {"rows": rows}
    for group in wanted:
        rows += told(group, run_group(*group, is_dry=context.is_dry), context)
    return rows


def in_processes(wanted: Sequence[Group], context: Context) -> list[dict[str, Any]]:
    """As many side by side as there are processors, up to ten: each takes memory of the device."""
    rows: list[dict[str, Any]] = []
    context.found = {"rows": rows}
    num_processes = max(1, min(_MOST_PROCESSES, len(os.sched_getaffinity(0)) - 1))
    with ThreadPoolExecutor(num_processes) as pool:
        started = [
            (group, pool.submit(_in_process, group, context.deadline, is_dry=context.is_dry))
            for group in wanted
        ]
        for group, future in started:
            rows += told(group, future.result(), context)
    return rows


def _in_process(group: Group, deadline: Deadline, *, is_dry: bool) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.gpu_check.correctness", *group]
    left = deadline.left()
    if left <= 0:
        return [_broken(group, "not begun in time")]
    try:
        done = subprocess.run(
            command + ["--dry-run"] * is_dry,
            # Some images have it on, and products of float32 come out with 10 bits.
            env={**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"},
            capture_output=True,
            text=True,
            timeout=left,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [_broken(group, f"not done after {left:.0f} s")]
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        problem = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return [_broken(group, f"process ended with {done.returncode}: {problem[:300]}")]
    rows: list[dict[str, Any]] = json.loads(lines[-1])
    return rows


def _broken(group: Group, problem: str) -> dict[str, Any]:
    name, dtype = group
    found = {"kernel": name, "case": f"{dtype}: all", "max_error": None, "tolerance": None}
    return {**found, "ok": False, "problem": problem}


def told(group: Group, rows: list[dict[str, Any]], context: Context) -> list[dict[str, Any]]:
    """The rows, after a line on them."""
    right = sum(row["ok"] for row in rows)
    errors = [row["max_error"] for row in rows if row["max_error"] is not None]
    context.say(
        f"  {group[0]:<17} {group[1]:<9} {right}/{len(rows)} right, "
        f"largest error {max(errors, default=0.0):.2g}"
    )
    for row in rows:
        if not row["ok"]:
            seen = row.get("problem") or f"{row['max_error']:.3g} > {row['tolerance']:.3g}"
            context.say(f"    WRONG {row['kernel']}, {row['case']}: {seen}")
    return rows


def run_group(name: str, dtype: str, *, is_dry: bool) -> list[dict[str, Any]]:
    """All cases of one kind in this process. Memory that a kernel should write starts as NaN."""
    device = torch.device("cpu" if is_dry else "cuda")
    lab = Lab(device, getattr(torch, dtype), is_dry)
    torch.manual_seed(0)
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [check.row() for check in _GROUPS[name](lab)]
    finally:
        torch.use_deterministic_algorithms(was)


def main(arguments: Sequence[str]) -> None:
    """Name, dtype, and ``--dry-run``: the rows as JSON on the last line."""
    name, dtype, *flags = arguments
    print(json.dumps(run_group(name, dtype, is_dry="--dry-run" in flags)))


if __name__ == "__main__":
    main(sys.argv[1:])
