"""The README's tables, made from the kept results and from nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

BEGIN = "<!-- benchmarks: written by `make bench` from benchmarks/results -->"
END = "<!-- benchmarks end -->"


def update_readme(readme: Path, results: Path) -> None:
    """Replace what stands between the markers. Results that are missing are left out."""
    text = readme.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    sections = [
        build(json.loads(path.read_text()))
        for name, build in _SECTIONS.items()
        if (path := results / f"cpu_{name}.json").exists()
    ]
    readme.write_text(head + BEGIN + "\n\n" + "\n\n".join(sections) + "\n\n" + END + tail)


def _table(rows: list[list[str]], headers: list[str]) -> str:
    return str(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


def _figure(spread: dict[str, float], digits: int = 1) -> str:
    """Median with minimum and maximum."""
    low, mid, high = (f"{spread[k]:.{digits}f}" for k in ("min", "median", "max"))
    return f"{mid} ({low} - {high})"


def _where(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}"


def _decision_time(result: dict[str, Any]) -> str:
    sizes = sorted({row["num_candidates"] for row in result["decision_time"]})
    rows = []
    for policy in dict.fromkeys(row["policy"] for row in result["decision_time"]):
        for situation in dict.fromkeys(row["situation"] for row in result["decision_time"]):
            cells = {
                row["num_candidates"]: f"{row['median_ms']:.2f} ({row['p90_ms']:.2f})"
                for row in result["decision_time"]
                if row["policy"] == policy and row["situation"] == situation
            }
            rows.append([f"`{policy}`, {situation}", *(cells.get(size, "") for size in sizes)])
    table = _table(rows, ["milliseconds, median (P90)", *(f"{s:,}" for s in sizes)])
    return f"**Decision time** by number of candidates: the whole of `Scheduler.plan()`.\n\n{table}"


def _hidden_attention(result: dict[str, Any]) -> str:
    times = result["milliseconds_per_layer"]
    base = times["absorbed"]["median"]
    rows = [
        [name, _figure(times[key]), f"{times[key]['median'] / base:.2f}"]
        for key, name in (
            ("kv", "keys and values"),
            ("absorbed", "hidden states, absorbed"),
            ("reprojected", "hidden states, re-projected"),
        )
    ]
    table = _table(rows, ["decode attention over", "ms per layer", "relative to absorbed"])
    return f"**Hidden cache**, one layer, {result['shape']}, float32.\n\n{table}"


def _step_breakdown(result: dict[str, Any]) -> str:
    parts = ("step", "matrix products", "attention", "rest")
    rows = [
        [name, *(_figure(values[part]) for part in parts)]
        for name, values in result["milliseconds"].items()
    ]
    table = _table(rows, ["tier, batch", *(f"{part}, ms" for part in parts)])
    return f"**Where a decode step goes** (same model, contexts of 129 to 152 tokens).\n\n{table}"


def _serving(result: dict[str, Any]) -> str:
    idle = {
        depth: {k: 100 * v for k, v in share.items()}
        for depth, share in result["idle_share"].items()
    }
    rows = [
        ["`aptserve up` until SERVING, s", _figure(result["seconds_to_serving"])],
        ["resident memory of the scheduler, MB", _figure(result["scheduler_resident_mb"], 0)],
        ["resident memory of the worker, MB", _figure(result["worker_resident_mb"], 0)],
        *(
            [f"worker's idle share between steps, {depth}, %", _figure(share)]
            for depth, share in idle.items()
        ),
        [
            "32 requests of 128 + 64 tokens through the service, OPT-125m shape, tokens/s",
            _figure(result["offline_tokens_per_second"], 0),
        ],
    ]
    table = _table(rows, ["", "median (min - max)"])
    return (
        "**The whole system** as processes, embedded model, "
        f"{result['load'].split(',')[0]}.\n\n{table}"
    )


def _cpu_engines(result: dict[str, Any]) -> str:
    steps, offline = result["decode_step_ms"], result["offline_tokens_per_second"]
    batches = list(next(iter(steps.values())))
    rows = [
        [engine, *(_figure(steps[engine][b]) for b in batches), _figure(offline[engine], 0)]
        for engine in steps
    ]
    headers = [
        "",
        *(f"decode step, batch {b}, ms" for b in batches),
        "32 requests of 128 + 64, tokens/s",
    ]
    rates = [
        [engine, *(f"{1e3 * int(b) / steps[engine][b]['median']:.0f}" for b in batches)]
        for engine in steps
    ]
    return (
        f"**Engines side by side**, {result['model']}, {_where(result)}; medians of "
        f"{result['rounds']} interleaved rounds (min - max).\n\n{_table(rows, headers)}\n\n"
        "Output tokens per second of decoding:\n\n"
        f"{_table(rates, ['', *(f'batch {b}' for b in batches)])}"
    )


_SECTIONS = {
    "cpu_engines": _cpu_engines,
    "step_breakdown": _step_breakdown,
    "hidden_attention": _hidden_attention,
    "decision_time": _decision_time,
    "serving": _serving,
}
