"""Kernels timed at the shapes of real models, beside what the device reaches and what torch does.

A row's share is the least time that its bytes and FLOP take at the measured ceilings over the time
that it took. Bytes and FLOP are those of :mod:`aptserve_kernels.costs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from aptserve_kernels import costs
from aptserve_kernels.costs import Cost, Shape

from benchmarks.gpu_check import ceilings
from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.context import Context
from benchmarks.gpu_check.timing import Call

OPT_13B = Shape(32, 1024, 40, 40, 128, 5120)
LLAMA_3_8B = Shape(32, 1024, 32, 8, 128, 4096)
_MODELS = {"OPT-13B": OPT_13B, "Llama-3-8B": LLAMA_3_8B}
_DRY_MODELS = {
    "tiny": Shape(2, 32, 2, 2, 16, 32, element_bytes=4),
    "tiny, grouped": Shape(2, 32, 4, 2, 16, 64, element_bytes=4),
}
_BATCHES = ((32, 1024), (32, 4096), (1, 16384), (32, 16384))
"""Sequences and cached tokens of each."""
_QUICK_BATCHES, _DRY_BATCHES = _BATCHES[:3:2], ((2, 32),)

_MEMORY_FACTOR = 5
"""Times the keys and values: the pool, the same in order, made anew from hidden states, twice."""
_CASE_SECONDS = 5.0
"""What one case may take, compilation included: none is begun with less left."""

_HIDDEN_OVER_KV = 1.15
_KV_SHARE = 0.8
_REPROJECTED_OVER_ABSORBED = 10.0


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel at a shape. ``of``: the kernel whose results the first part has judged, if any."""

    name: str
    cost: Cost
    call: Call
    of: str | None = None


def measure(context: Context) -> dict[str, Any]:
    """Rows by model, batch and context, then the ratios that matter."""
    if context.ceilings is None:
        ceilings.measure(context)
    models = _DRY_MODELS if context.is_dry else _MODELS
    batches: Sequence[tuple[int, int]] = _QUICK_BATCHES if context.is_quick else _BATCHES
    if context.is_dry:
        batches = _DRY_BATCHES
    rows: list[dict[str, Any]] = []
    context.found = {"rows": rows, "ratios": []}
    for batch, tokens in batches:
        for model, of_model in models.items():
            shape = replace(of_model, batch=batch, context=tokens)
            _measure(context, model, shape, _decode_cases, rows)
    for model, of_model in models.items():
        _measure(context, model, of_model, _other_cases, rows)
    return {"rows": rows, "ratios": ratios(rows)}


def _measure(
    context: Context,
    model: str,
    shape: Shape,
    cases: Callable[[Bench], Iterator[Case]],
    rows: list[dict[str, Any]],
) -> None:
    where = f"{model}, {shape.batch} x {shape.context:,}"
    if not context.has_seconds(_CASE_SECONDS, where):
        return
    needed = _MEMORY_FACTOR * shape.batch * shape.context * costs.kv_token_bytes(shape)
    if needed > context.free_bytes():
        context.note(f"{where} left out: takes {needed / 2**30:.0f} GiB of the device's memory")
        return
    context.say(f"  {where} cached tokens")
    try:
        bench = Bench.make(shape, context.device, is_dry=context.is_dry)
        for case in cases(bench):
            if not context.has_seconds(_CASE_SECONDS, f"{where}, {case.name} and what follows"):
                break
            rows.append(_row(context, model, shape, case))
    except torch.cuda.OutOfMemoryError:
        context.note(f"{where}: out of memory, what follows is left out")


def _row(context: Context, model: str, shape: Shape, case: Case) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": model,
        "batch": shape.batch,
        "context": shape.context,
        "case": case.name,
    }
    try:
        timing = context.timer(case.call)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as problem:
        text = (str(problem) or "?").strip().splitlines()[0][:200]
        context.say(f"    {case.name:<42} FAILED {type(problem).__name__}: {text}")
        return {**row, "problem": f"{type(problem).__name__}: {text}"}
    assert context.ceilings is not None
    row |= {
        "seconds": timing.median,
        "low_seconds": timing.low,
        "high_seconds": timing.high,
        "repeats": timing.repeats,
        "how": timing.how,
        "bytes_per_second": case.cost.bytes / timing.median,
        "flop_per_second": case.cost.flop / timing.median,
        "share": costs.roofline_seconds(case.cost, context.ceilings) / timing.median,
        "bound": costs.bound(case.cost, context.ceilings),
        "is_wrong": case.of in context.wrong_kernels,
    }
    context.say(f"    {case.name:<42} {line(row)}")
    return row


def line(row: dict[str, Any]) -> str:
    """The figures of a row in words."""
    text = (
        f"{row['seconds'] * 1e6:10,.1f} µs ({row['low_seconds'] * 1e6:,.1f} - "
        f"{row['high_seconds'] * 1e6:,.1f}), {row['bytes_per_second'] / 1e9:,.0f} GB/s, "
        f"{row['flop_per_second'] / 1e12:,.1f} TFLOP/s, {row['share']:.0%} of {row['bound']}"
    )
    text += "" if row["how"] != "calls" else ", not as a graph"
    return text + (", RESULTS ARE WRONG" if row["is_wrong"] else "")


def _decode_cases(b: Bench) -> Iterator[Case]:
    """Decode attention over every form of cache, and what torch does in its place."""
    s = b.shape
    yield Case("keys and values", costs.decode_kv(s), b.decode_kv, "decode_kv")
    if s.geometry.hidden_units:
        products = costs.fold(s) + costs.unfold(s)
        absorbed = costs.decode_hidden(s)
        yield Case("hidden, absorbed", absorbed, b.decode_hidden, "decode_hidden")
        yield Case(
            "hidden, absorbed, with its products",
            absorbed + products,
            b.decode_absorbed,
            "decode_hidden",
        )
    for code_dtype, call in b.decode_kv8_calls():
        name = f"kv8, {str(code_dtype).removeprefix('torch.')}"
        yield Case(name, costs.decode_kv8(s), call, "decode_kv8")
    yield Case("torch, keys and values in order", costs.decode_kv(s), b.torch_decode())
    if s.geometry.hidden_units:
        yield Case("hidden, re-projected each step (torch)", b.reprojected_cost, b.reprojected)
        yield Case(
            "hidden, projected (rotary)",
            costs.decode_projected(s),
            b.decode_projected,
            "decode_projected",
        )


def _other_cases(b: Bench) -> Iterator[Case]:
    """Prefill, writes, promotion, sampling."""
    yield from _prefill_cases(b)
    s = b.shape
    for rows in b.write_rows:
        of_rows = replace(s, batch=rows, context=1)
        yield Case(f"write {rows} tokens", costs.write_kv(of_rows), b.write_kv(rows), "write_cache")
        if s.geometry.hidden_units:
            yield Case(
                f"write {rows} hidden states",
                costs.write_hidden(of_rows),
                b.write_hidden(rows),
                "write_cache",
            )
        for code_dtype, call in b.write_kv8_calls(rows):
            name = f"write {rows} tokens, {str(code_dtype).removeprefix('torch.')}"
            yield Case(name, costs.write_kv8(of_rows), call, "write_kv8")
    if s.geometry.hidden_units:
        alone = replace(s, batch=1)
        yield Case(f"promote {s.context} tokens", costs.promote(alone), b.promote, "promote")
    for rows, name, call in b.sample_calls():
        cost = costs.sample(rows, b.vocab_size)
        yield Case(f"sample {rows} rows of {b.vocab_size:,}, {name}", cost, call, "sample")


def _prefill_cases(b: Bench) -> Iterator[Case]:
    for about, prefill in b.prefills():
        cost = costs.prefill(prefill.shape)
        name = f"{prefill.shape.batch} {about}"
        if prefill.is_whole:
            yield Case(f"prefill, {name}", cost, prefill.ragged, "attend_ragged")
        yield Case(f"prefill in blocks, {name}", cost, prefill.paged, "prefill_kv")
        yield Case(f"torch, {name}", cost, prefill.torch_attention)


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was to be reached, by model, batch and context, with whether it was."""
    found = []
    for key in dict.fromkeys((row["model"], row["batch"], row["context"]) for row in rows):
        of_key = {
            row["case"]: row
            for row in rows
            if (row["model"], row["batch"], row["context"]) == key and "seconds" in row
        }
        for name, value, reach, is_reached in _ratios(of_key):
            found.append(
                {
                    **dict(zip(("model", "batch", "context"), key, strict=True)),
                    "ratio": name,
                    "value": value,
                    "reach": reach,
                    "is_reached": is_reached,
                }
            )
    return found


def _ratios(rows: dict[str, dict[str, Any]]) -> Iterator[tuple[str, float, str, bool | None]]:
    def over(first: str, second: str) -> float | None:
        if first not in rows or second not in rows:
            return None
        return float(rows[first]["seconds"] / rows[second]["seconds"])

    kv, hidden = "keys and values", "hidden, absorbed"
    made_anew = "hidden, re-projected each step (torch)"
    if kv in rows:
        share = float(rows[kv]["share"])
        yield "keys and values, share of copy", share, f">= {_KV_SHARE}", share >= _KV_SHARE
    if (ratio := over(hidden, kv)) is not None:
        reach = f"<= {_HIDDEN_OVER_KV}"
        yield "hidden over keys and values", ratio, reach, ratio <= _HIDDEN_OVER_KV
    if (ratio := over(f"{hidden}, with its products", kv)) is not None:
        yield "the same with its products", ratio, "", None
    if (ratio := over(made_anew, f"{hidden}, with its products")) is not None:
        reach = f">= {_REPROJECTED_OVER_ABSORBED:g}"
        is_reached = ratio >= _REPROJECTED_OVER_ABSORBED
        yield "re-projected over absorbed", ratio, reach, is_reached
    if (ratio := over("torch, keys and values in order", kv)) is not None:
        yield "torch over keys and values", ratio, "", None
    for code_dtype in ("int8", "float8_e4m3fn"):
        if (ratio := over(f"kv8, {code_dtype}", kv)) is not None:
            yield f"kv8 ({code_dtype}) over keys and values", ratio, "", None
