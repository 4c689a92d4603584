"""What decode attention costs in each tier by formula: nothing is run, and no GPU is needed.

    python -m benchmarks.kernel_costs

Writes ``results/kernel_costs.json`` and the tables made from it, ``results/kernel_costs.md``. The
formulas are those of ``aptserve_kernels.costs``; times are the least that a GPU's published peaks
allow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aptserve_kernels import costs
from aptserve_kernels.costs import GPUS, Cost, Shape

RESULTS = Path(__file__).parent / "results"

BATCH = 32
CONTEXTS = (1024, 4096, 16384)
SHOWN_GPUS = ("A100-80G", "H100")
_KIB = 1024


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder's attention. ``absorbs``: nothing stands between a hidden state and its key."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    absorbs: bool

    def shape(self, context: int) -> Shape:
        return Shape(
            batch=BATCH,
            context=context,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            hidden_size=self.hidden_size,
        )


MODELS = {
    "OPT-13B": Model(40, 5120, 40, 40, 128, absorbs=True),
    "Llama-2-13B": Model(40, 5120, 40, 40, 128, absorbs=False),
    "Llama-3-8B": Model(32, 4096, 32, 8, 128, absorbs=False),
}


def _fold_and_unfold(shape: Shape) -> Cost:
    return costs.fold(shape) + costs.unfold(shape)


@dataclass(frozen=True, slots=True)
class Form:
    """A way to decode: bytes of a cached token, attention, and the products that KV needs not."""

    name: str
    token_bytes: Callable[[Shape], int]
    attention: Callable[[Shape], Cost]
    products: Callable[[Shape], Cost] | None = None


KV = Form("kv", costs.kv_token_bytes, costs.decode_kv)
KV8 = Form("kv8", costs.kv8_token_bytes, costs.decode_kv8)
ABSORBED = Form("hidden, absorbed", costs.hidden_token_bytes, costs.decode_hidden, _fold_and_unfold)
PROJECTED = Form(
    "hidden, projected", costs.hidden_token_bytes, costs.decode_projected, costs.unfold
)
REPROJECTED = Form("hidden, re-projected", costs.hidden_token_bytes, costs.decode_reprojected)


def forms_of(model: Model) -> list[Form]:
    """Those that the model can decode with."""
    if not model.shape(1).geometry.hidden_units:
        return [KV, KV8]
    return [KV, ABSORBED if model.absorbs else PROJECTED, REPROJECTED, KV8]


def measure() -> dict[str, Any]:
    """All numbers, per layer and for a step of all layers."""
    return {
        "analytic": True,
        "batch": BATCH,
        "element_bytes": 2,
        "gpus": {
            name: {"bandwidth": gpu.bandwidth, "flops": gpu.flops, "ridge": round(gpu.ridge, 1)}
            for name, gpu in GPUS.items()
        },
        "token_kib": {name: _token_kib(model) for name, model in MODELS.items()},
        "decode": [
            _row(name, model, context, form)
            for name, model in MODELS.items()
            for context in CONTEXTS
            for form in forms_of(model)
        ],
    }


def _token_kib(model: Model) -> dict[str, float | None]:
    """Cache of one token in all layers; None where a tier would save nothing."""
    shape, layers = model.shape(1), model.num_layers
    hidden = costs.hidden_token_bytes(shape) if shape.geometry.hidden_units else None
    return {
        "kv": layers * costs.kv_token_bytes(shape) / _KIB,
        "hidden": None if hidden is None else layers * hidden / _KIB,
        "kv8": layers * costs.kv8_token_bytes(shape) / _KIB,
    }


def _row(name: str, model: Model, context: int, form: Form) -> dict[str, Any]:
    shape = model.shape(context)
    cost = form.attention(shape)
    around = form.products(shape) if form.products else None
    cached = model.num_layers * BATCH * context * form.token_bytes(shape)
    return {
        "model": name,
        "context": context,
        "form": form.name,
        "cache_gib": round(cached / _KIB**3, 2),
        "bytes": cost.bytes,
        "flop": cost.flop,
        "flop_per_byte": round(cost.intensity, 2),
        "products_bytes": around.bytes if around else 0,
        "products_flop": around.flop if around else 0,
        "gpus": {gpu: _times(gpu, cost, around, model.num_layers) for gpu in GPUS},
    }


def _times(gpu: str, cost: Cost, around: Cost | None, num_layers: int) -> dict[str, Any]:
    seconds = costs.roofline_seconds(cost, GPUS[gpu])
    products = costs.roofline_seconds(around, GPUS[gpu]) if around else 0.0
    return {
        "layer_microseconds": round(1e6 * seconds, 1),
        "products_microseconds": round(1e6 * products, 1),
        "step_milliseconds": round(1e3 * num_layers * (seconds + products), 2),
        "bound": costs.bound(cost, GPUS[gpu]),
    }


def markdown(result: dict[str, Any]) -> str:
    """The tables, and what they say."""
    ridges = ", ".join(f"{name} {gpu['ridge']:.0f}" for name, gpu in result["gpus"].items())
    return "\n\n".join(
        (
            "# Decode attention by formula",
            "Bytes and FLOP from the formulas in `kernels/aptserve_kernels/costs.py`, times from "
            "the GPUs' published bandwidth and dense bfloat16 peak: the least that is possible. "
            "**No GPU was used.** Written by `python -m benchmarks.kernel_costs`.",
            "Cache of one token in all layers, KiB:",
            _memory_table(result),
            f"Attention of one layer, {result['batch']} sequences, 16-bit elements; cache and step "
            "are of all layers. What is added to a time is for folding and unfolding weights, "
            "which KV needs not; a step has it.",
            _decode_table(result),
            f"Arithmetic is the bound above these FLOP per byte: {ridges}. Absorbed attention has "
            "about as many as a layer has heads, since each hidden state is read twice, for all "
            "heads at once. So with 40 heads memory is the bound on all of them, and still is when "
            "40 heads are padded to tiles of 64; it would be arithmetic with more heads than the "
            "figures above, and with far fewer in float32, for which there are no tensor cores.",
            "Projected keys cost thousands of FLOP per byte: there the hidden tier buys memory "
            "with time, half as much of it as when keys and values are re-projected. A "
            "grouped-query model has no hidden tier, because its hidden states are larger than its "
            "keys and values: twice for Llama-3-8B.",
        )
    )


def _memory_table(result: dict[str, Any]) -> str:
    rows = [
        [name, *("not offered" if size is None else f"{size:g}" for size in sizes.values())]
        for name, sizes in result["token_kib"].items()
    ]
    return _table(["model", "kv", "hidden", "kv8"], rows)


def _decode_table(result: dict[str, Any]) -> str:
    rows = [
        [
            row["model"],
            f"{row['context']:,}",
            row["form"],
            f"{row['cache_gib']:,.1f}",
            f"{row['bytes'] / 1e6:,.0f}",
            f"{row['flop'] / 1e9:,.1f}",
            f"{row['flop_per_byte']:,.0f}",
            *(cell for gpu in SHOWN_GPUS for cell in _time_cells(row["gpus"][gpu])),
        ]
        for row in result["decode"]
    ]
    times = [f"{gpu}, {what}" for gpu in SHOWN_GPUS for what in ("µs", "bound", "step, ms")]
    return _table(["model", "context", "form", "cache, GiB", "MB", "GFLOP", "FLOP/B", *times], rows)


def _time_cells(times: dict[str, Any]) -> list[str]:
    micros = f"{times['layer_microseconds']:,.0f}"
    if times["products_microseconds"]:
        micros += f" + {times['products_microseconds']:,.0f}"
    return [micros, times["bound"], f"{times['step_milliseconds']:,.1f}"]


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Write both files."""
    result = measure()
    (RESULTS / "kernel_costs.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "kernel_costs.md").write_text(markdown(result) + "\n")
    print(markdown(result))


if __name__ == "__main__":
    main()
