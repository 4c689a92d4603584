"""The README's tables, made from the kept results and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
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
        section(name, json.loads(path.read_text()))
        for name in _SECTIONS
        if (path := results / f"cpu_{name}.json").exists()
    ]
    readme.write_text(head + BEGIN + "\n\n" + "\n\n".join(sections) + "\n\n" + END + tail)


def section(name: str, result: dict[str, Any]) -> str:
    """What the README says of one benchmark."""
    return _SECTIONS[name](result)


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


def _kv8_quality(result: dict[str, Any]) -> str:
    names = {"kv": "keys and values", "int8": "`kv8`, int8", "fp8": "`kv8`, fp8 (e4m3)"}
    rows = [
        [
            names[key],
            f"{found['perplexity']:.2f}",
            f"{100 * found['equal_decisions']:.1f}",
            f"{100 * found['equal_continuations']:.0f}",
        ]
        for key, found in result["kv8_quality"].items()
    ]
    table = _table(
        rows, ["cache", "perplexity", "equal greedy choices, %", "equal continuations, %"]
    )
    return (
        f"**The 8-bit tier**, embedded model. Perplexity of {result['text']}; greedy "
        f"continuations, {result['continuations']}, against those over keys and values.\n\n{table}"
    )


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


def _fidelity(result: dict[str, Any]) -> str:
    rows = [
        [
            f"`{cell['policy']}`, {cell['times']:g} x",
            *(f"{100 * cell[which]['both']:.1f}" for which in ("live", "simulated")),
            *(f"{cell['points'][name]:+.1f}" for name in ("both", "ttft", "tbt")),
        ]
        for cell in result["summary"]["cells"]
    ]
    headers = ["policy, rate", "live, %", "simulated, %", "both", "TTFT", "TBT"]
    summary, load = result["summary"], result["load"]
    both, foretold = (summary[which]["both"] for which in ("simulated", "foretold"))
    num_seeds = len({run["seed"] for run in result["runs"]})
    return (
        "**The simulator against the service**: requests within their objectives, the same traces "
        f"live on the CPU worker and simulated with its calibration, {load['num_requests']} "
        f"requests, {num_seeds} seeds; 1 x is {load['sustainable_requests_per_second']:.1f} "
        "requests/s. Differences, simulated less live, are percentage points.\n\n"
        f"{_table(rows, headers)}\n\n"
        f"Over single runs the difference is {both['mean_points']:+.1f} points in the mean, "
        f"{both['mean_absolute_points']:.1f} in absolute value, {both['worst_points']:+.1f} at "
        f"worst; from what was known before the run {foretold['mean_points']:+.1f}, "
        f"{foretold['mean_absolute_points']:.1f}, {foretold['worst_points']:+.1f}."
    )


def _live_policies(result: dict[str, Any]) -> str:
    policies, load = result["policies"], result["load"]
    rates = [point["requests_per_second"] for point in policies["fcfs"]["attainment"]]
    rows = [
        [
            f"`{policy}`",
            *(
                _with_interval(100 * point["mean"], point["half_width"], 100, 0)
                for point in found["attainment"]
            ),
            {"found": "", "at_least": "over ", "below": "under "}[found["bound"]]
            + _with_interval(found["goodput_requests_per_second"], found["half_width"], 1, 1),
            _ratio(found),
        ]
        for policy, found in policies.items()
    ]
    headers = [
        "requests within objectives, %",
        *(f"{rate:.1f}/s" for rate in rates),
        f"goodput at {100 * result['target']:.0f} %, requests/s",
        "of fcfs",
    ]
    num_seeds = len({run["seed"] for run in result["runs"]})
    return (
        f"**Policies live on the CPU worker**, short of memory: {load['pool_units']} units, "
        f"{load['num_requests']} requests, {num_seeds} seeds, first token within "
        f"{load['ttft_objective_seconds']:g} s and {load['tbt_objective_seconds']:g} s between "
        f"tokens; ± is the 95 % interval over seeds.\n\n{_table(rows, headers)}"
    )


def _with_interval(value: float, half_width: float | None, scale: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text if half_width is None else f"{text} ± {scale * half_width:.{digits}f}"


def _ratio(found: dict[str, Any]) -> str:
    if found["ratio_to_fcfs"] is None:
        return "not known"
    text = _with_interval(found["ratio_to_fcfs"], found["ratio_half_width"], 1, 2)
    return f"over {text}" if found["ratio_is_at_least"] else text


def _simulation(result: dict[str, Any]) -> str:
    runs = result["simulation"]
    rates = sorted({run["rate"] for run in runs})
    speed = {
        (run["policy"], run["rate"]): _figure(run["simulated_seconds_per_second"], 0)
        for run in runs
    }
    rows = [
        [f"`{policy}`", *(speed[policy, rate] for rate in rates)]
        for policy in dict.fromkeys(run["policy"] for run in runs)
    ]
    table = _table(rows, ["simulated s per s", *(f"{rate:g} requests/s" for rate in rates)])
    return (
        f"**Simulator**, one process, {result['num_requests']:,} requests of ShareGPT lengths on "
        f"OPT-13B, A100-40G with KV and hidden; 1.1/s is about what `fcfs` sustains.\n\n{table}"
    )


_SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "cpu_engines": _cpu_engines,
    "step_breakdown": _step_breakdown,
    "hidden_attention": _hidden_attention,
    "kv8_quality": _kv8_quality,
    "decision_time": _decision_time,
    "serving": _serving,
    "simulation": _simulation,
    "fidelity": _fidelity,
    "live_policies": _live_policies,
}
