"""The simulator's cost model against public timings of GPU kernels, to which it is fitted.

    python -m benchmarks.cost_model --profiles DIR

DIR holds operator timings of one layer as CSV files: ``vidur_*`` (microsoft/vidur, MIT) and
``aiconfigurator_*`` (ai-dynamo/aiconfigurator, Apache-2.0), latencies in milliseconds. The shares
found belong into ``aptserve_scheduler/sim/cost/hardware.py``; the result says how far those that
are there are from them, and every error is that of those that are there.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from aptserve_scheduler.sim.cost import GPUS, Efficiency, Gpu, Link, fit_estimate, make_worker
from scipy.optimize import least_squares

from benchmarks.cost_profiles import RANKS, Case, Column, read_cases

RESULT = Path(__file__).parent / "results" / "cost_model.json"
PROFILED = {"a100": "a100-80g", "h100": "h100"}
"""GPU of the profiles: its name here."""

_START = Efficiency(5e-6, 0.8, 0.8, 30.0, 1e-5, 0.8, 30.0, 1e-5, 0.6, 200.0, 3e-6, 0.5)
_FITTED = {
    "gemm": ("gemm_floor", "gemm_bandwidth", "gemm_compute", "gemm_extra_rows"),
    "decode attention": ("decode_floor", "decode_bandwidth", "decode_blocks"),
    "prefill attention": ("prefill_floor", "prefill_compute", "prefill_extra_keys"),
    "elementwise": ("elementwise_floor", "elementwise_bandwidth"),
}
_OUTLIER = 0.1
"""Relative error from which a timing counts less and less in a fit."""


def measure(profiles: Path) -> dict[str, Any]:
    """Errors per kernel family, GPU and layer; the fitted shares beside those in use."""
    rows, shares = [], {}
    for key, name in PROFILED.items():
        cases = read_cases(profiles, key)
        rows += [_errors(case, GPUS[name]) for case in cases]
        shares[name] = _compare(GPUS[name].efficiency, _fit(GPUS[name], cases))
    return {
        "sources": "microsoft/vidur 7d475133 (MIT), ai-dynamo/aiconfigurator 095f58a5 (Apache-2.0)",
        "gpus": {gpu.name: _describe(gpu) for gpu in GPUS.values()},
        "errors": rows,
        "shares": shares,
        "linear_estimates": list(_estimates()),
    }


def _describe(gpu: Gpu) -> dict[str, Any]:
    return {
        "memory_bytes": gpu.memory_bytes,
        "bandwidth": gpu.bandwidth,
        "flops": gpu.flops,
        "shares_from": gpu.source,
    }


def _errors(case: Case, gpu: Gpu) -> dict[str, Any]:
    """Relative errors of the model."""
    errors = case.predict(gpu) / case.seconds - 1.0
    return {
        "gpu": gpu.name,
        "family": case.family,
        "of": case.of,
        "in_sample": case.in_sample,
        "num_timings": len(errors),
        "median_error": _rounded(np.median(np.abs(errors))),
        "p90_error": _rounded(np.quantile(np.abs(errors), 0.9)),
        "median_signed_error": _rounded(np.median(errors)),
    }


def _fit(gpu: Gpu, cases: Sequence[Case]) -> Efficiency:
    """Shares that fit the cases in the sample best, family by family."""
    found = _START
    for family, names in _FITTED.items():
        fitted = [case for case in cases if case.family == family and case.in_sample]
        start = [getattr(found, name) for name in names]
        values = _solve(gpu, fitted, start, _setter(found, names))
        found = _setter(found, names)(values)
    links = {}
    for ranks, case in zip(RANKS, (c for c in cases if c.family == "all-reduce"), strict=True):
        setter = _link_setter(found, ranks)
        links[ranks] = Link(*_solve(gpu, [case], [4e-5, 2e11], setter).tolist())
    return replace(found, links=links)


def _solve(
    gpu: Gpu, cases: Sequence[Case], start: list[float], setter: Callable[[Column], Efficiency]
) -> Column:
    """Least squares of log ratios, outliers weighing less; positive values.

    Each case weighs as much as the others, however many timings it has.
    """
    largest = max(len(case.seconds) for case in cases)
    counts = [round(largest / len(case.seconds)) for case in cases]

    def errors(logs: Column) -> Column:
        tried = replace(gpu, efficiency=setter(np.exp(logs)))
        ratios = [case.predict(tried) / case.seconds for case in cases]
        tiled = [np.tile(r, n) for r, n in zip(ratios, counts, strict=True)]
        return np.asarray(np.log(np.concatenate(tiled)))

    found = least_squares(errors, np.log(start), loss="soft_l1", f_scale=_OUTLIER)
    return np.asarray(np.exp(found.x))


def _setter(base: Efficiency, names: Sequence[str]) -> Callable[[Column], Efficiency]:
    return lambda values: replace(base, **dict(zip(names, values.tolist(), strict=True)))


def _link_setter(base: Efficiency, ranks: int) -> Callable[[Column], Efficiency]:
    return lambda values: replace(base, links={ranks: Link(*values.tolist())})


def _compare(used: Efficiency, fitted: Efficiency) -> dict[str, Any]:
    return {
        name: {"used": _plain(getattr(used, name)), "fitted": _plain(getattr(fitted, name))}
        for name in (*(name for names in _FITTED.values() for name in names), "links")
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            str(k): {n: float(f"{v:.4g}") for n, v in asdict(x).items()} for k, x in value.items()
        }
    return float(f"{value:.5g}")


def _estimates() -> Iterator[dict[str, Any]]:
    """How well the linear form that a worker advertises follows this model."""
    for model, gpu, tiers, form in (
        ("opt-13b", "a100-40g", ("kv",), None),
        ("opt-13b", "a100-40g", ("kv", "hidden"), "absorbed"),
        ("opt-13b", "a100-40g", ("kv", "hidden"), "reprojected"),
        ("llama-2-7b", "h100", ("kv", "hidden"), "projected"),
    ):
        worker = make_worker(model, gpu, tiers=tiers, hidden_attention=form)
        spec = worker.spec
        found = fit_estimate(
            worker.cost,
            [tier.tier for tier in spec.tiers],
            max_num_seqs=spec.max_num_seqs,
            max_num_batched_tokens=spec.max_num_batched_tokens,
            max_cached_tokens=spec.num_units * spec.block_size // 2,
        )
        yield {
            "worker": f"{model} on {gpu}, {'+'.join(tiers)}" + (f", {form}" if form else ""),
            "num_units": spec.num_units,
            "median_error": _rounded(found.median_error),
            "p90_error": _rounded(found.p90_error),
        }


def _rounded(value: Any) -> float:
    return round(float(value), 4)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost_model")
    parser.add_argument(
        "--profiles",
        type=Path,
        default=os.environ.get("APTSERVE_PROFILES"),
        help="folder of the CSV files (default: $APTSERVE_PROFILES)",
    )
    parser.add_argument("--output", type=Path, default=RESULT, help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.profiles is None:
        parser.error("--profiles or APTSERVE_PROFILES is needed")
    arguments.output.write_text(json.dumps(measure(arguments.profiles), indent=2) + "\n")
    print(arguments.output)


if __name__ == "__main__":
    main()
