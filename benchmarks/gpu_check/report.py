"""What the check found, as JSON and as Markdown, named after the device."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Cells = list[str]


def describe_device(device: torch.device) -> dict[str, Any]:
    """Device, driver and versions, as a reader needs them to judge a number."""
    found: dict[str, Any] = {"device": "cpu", "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "driver": _driver(),
        }
    found["python"] = platform.python_version()
    return found | {name: _version(name) for name in ("torch", "triton", "transformers")}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def file_name(device: str, suffix: str = "") -> str:
    """``NVIDIA H100 80GB HBM3`` gives ``gpu_check_nvidia_h100_80gb_hbm3``."""
    return "_".join(["gpu_check", *re.findall(r"[a-z0-9]+", device.lower())]) + suffix


def write(folder: Path, name: str, result: dict[str, Any]) -> list[Path]:
    """Both files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    paths[0].write_text(json.dumps(result, indent=2) + "\n")
    paths[1].write_text(markdown(result) + "\n")
    return paths


def markdown(result: dict[str, Any]) -> str:
    """The page."""
    about = result["about"]
    facts = ", ".join(f"{k} {v}" for k, v in about.items() if k not in ("device", "date") and v)
    lines = [
        f"# {about['device']}",
        f"{about['date']}; {facts}. {result['total_seconds']:.0f} s. Written by `make gpu-check`.",
        _table(
            ["part", "status", "seconds"],
            [[name, p["status"], f"{p['seconds']:.0f}"] for name, p in result["parts"].items()],
        ),
    ]
    for name, part in result["parts"].items():
        section = _SECTIONS[name](part) if len(part) > len(_COMMON) else []
        notes = [f"- {note}" for note in part["notes"]]
        if section or notes:
            lines += [f"## {_TITLES[name]}", *section]
        if notes:
            lines.append("\n".join(notes))
    return "\n\n".join(lines)


_COMMON = ("status", "seconds", "notes")


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _correctness(part: dict[str, Any]) -> list[str]:
    """A line per kernel, then those that failed."""
    kernels: dict[str, list[dict[str, Any]]] = {}
    for row in part["rows"]:
        kernels.setdefault(row["kernel"], []).append(row)
    rows = [
        [
            kernel,
            str(len(of_kernel)),
            str(sum(row["ok"] for row in of_kernel)),
            _most(of_kernel),
        ]
        for kernel, of_kernel in kernels.items()
    ]
    wrong = [
        [row["kernel"], row["case"], row.get("problem") or f"{row['max_error']:.3g}"]
        for row in part["rows"]
        if not row["ok"]
    ]
    tables = [_table(["kernel", "cases", "right", "largest error over its tolerance"], rows)]
    return tables + ([_table(["kernel", "case", "what is wrong"], wrong)] if wrong else [])


def _most(rows: Sequence[dict[str, Any]]) -> str:
    """The largest share of a tolerance that an error takes."""
    shares = [
        row["max_error"] / row["tolerance"]
        for row in rows
        if row["max_error"] is not None and row["tolerance"]
    ]
    if shares:
        return f"{max(shares):.2f}"
    return "none differs" if all(row["ok"] for row in rows) else "?"


def _ceilings(part: dict[str, Any]) -> list[str]:
    return [
        f"Copy {part['copy_bytes_per_second'] / 1e9:,.0f} GB/s (read and written), bfloat16 "
        f"product {part['bfloat16_flop_per_second'] / 1e12:,.0f} TFLOP/s."
    ]


def _kernels(part: dict[str, Any]) -> list[str]:
    reached = [
        [
            row["model"],
            f"{row['batch']} x {row['context']:,}",
            row["ratio"],
            f"{row['value']:.2f}",
            row["reach"],
            {True: "yes", False: "no", None: ""}[row["is_reached"]],
        ]
        for row in part["ratios"]
    ]
    headers = ["model", "sequences x tokens", "ratio", "measured", "to reach", "reached"]
    times = ["model", "sequences x tokens", "case", "µs (min - max)", "GB/s", "TFLOP/s", "share"]
    return [_table(headers, reached), _table(times, [_kernel_cells(row) for row in part["rows"]])]


def _kernel_cells(row: dict[str, Any]) -> Cells:
    where = [row["model"], f"{row['batch']} x {row['context']:,}", row["case"]]
    if "problem" in row:
        return [*where, row["problem"], "", "", ""]
    micros = [row[f"{kind}seconds"] * 1e6 for kind in ("", "low_", "high_")]
    marks = (" not as a graph" if row["how"] == "calls" else "") + (
        " **wrong results**" if row["is_wrong"] else ""
    )
    return [
        *where,
        f"{micros[0]:,.1f} ({micros[1]:,.1f} - {micros[2]:,.1f}){marks}",
        f"{row['bytes_per_second'] / 1e9:,.0f}",
        f"{row['flop_per_second'] / 1e12:,.1f}",
        f"{row['share']:.0%} of {row['bound']}",
    ]


def _end_to_end(part: dict[str, Any]) -> list[str]:
    steps = [
        [
            row["graphs"],
            "ahead" if row["overlaps"] else "waited for",
            row["tier"],
            str(row["batch"]),
            f"{row['step_seconds'] * 1e3:.2f} ({row['low_seconds'] * 1e3:.2f} - "
            f"{row['high_seconds'] * 1e3:.2f})",
            f"{row['tokens_per_second']:,.0f}",
            "" if row["idle_share"] is None else f"{row['idle_share']:.0%}",
        ]
        for row in part["steps"]
    ]
    rates = [
        [
            row["engine"],
            str(row["num_requests"]),
            f"{row['num_tokens']:,}",
            f"{row['seconds']:.2f}",
            f"{row['tokens_per_second']:,.0f}",
        ]
        for row in part["throughput"]
    ]
    agreement = [f"- {name}: {share:.0%}" for name, share in part["agreement"].items()]
    return [
        _table(["graphs", "steps", "tier", "batch", "ms a step", "tokens/s", "device idle"], steps),
        _table(["engine", "requests", "output tokens", "seconds", "tokens/s"], rates),
        "Tokens equal to those of the first until they part:",
        "\n".join(agreement) or "none compared",
    ]


def _goodput(part: dict[str, Any]) -> list[str]:
    rows = [
        [
            f"`{row['policy']}`, {' and '.join(row['tiers'])}",
            f"{row['requests_per_second']:.2f}",
            str(row["num_requests"]),
            f"{row['attainment']:.0%}",
            str(row["num_finished"]),
            f"{row['idle_share']:.0%}",
        ]
        for row in part["rows"]
    ]
    headers = ["system", "requests/s", "requests", "good", "ended", "between steps"]
    ttft, tbt = part["objectives_seconds"]
    return [
        f"A pool of {part['pool_tokens']:,} tokens as keys and values; good: first token within "
        f"{ttft:g} s, P99 between tokens within {tbt:g} s.",
        _table(headers, rows),
    ]


_SECTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "correctness": _correctness,
    "ceilings": _ceilings,
    "kernels": _kernels,
    "end_to_end": _end_to_end,
    "goodput": _goodput,
}
_TITLES = {
    "correctness": "Kernels against their torch twins",
    "ceilings": "What the device reaches",
    "kernels": "Kernels timed",
    "end_to_end": "A model of OPT-13B's shape, random weights",
    "goodput": "Attainment in a pool that is too small",
}
