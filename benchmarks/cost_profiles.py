"""Public timings of GPU kernels beside what the simulator's cost model says of them."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from aptserve_scheduler.sim.cost import Gpu

Column = npt.NDArray[np.float64]
Table = dict[str, Column]

RANKS = (2, 4)


@dataclass(frozen=True)
class Case:
    """Timings of one kind, and what the model says of them."""

    family: str
    of: str
    in_sample: bool
    seconds: Column
    predict: Callable[[Gpu], Column]


@dataclass(frozen=True)
class Profiled:
    """A model of the profiles."""

    key: str
    name: str
    gated: bool


LLAMA = Profiled("llama2_7b", "Llama-2-7B", gated=True)
MODELS = (
    LLAMA,
    Profiled("internlm_20b", "Llama-2-13B shape (internlm_20b)", gated=True),
    Profiled("phi2_mha32", "OPT-2.7B-like shape (phi2)", gated=False),
    Profiled("qwen_72b_mha64", "Qwen-72B, 64 KV heads", gated=True),
)


def read_cases(profiles: Path, key: str) -> list[Case]:
    """Kernels and layers of the GPU that the files call ``key``; in all-reduces, by ``RANKS``."""
    return [*_kernels(profiles, key), *_layers(profiles, key)]


def _kernels(profiles: Path, key: str) -> Iterator[Case]:
    yield from _gemms(profiles, key)
    yield from _attentions(profiles, key)
    for model in MODELS:
        if table := _table(profiles, f"vidur_mlp_{key}_{model.key}"):
            for family, cases in _operators(model, table).items():
                seconds = np.concatenate([seconds for seconds, _ in cases])
                predict = _joined([predict for _, predict in cases])
                # One model's take part in the fit, so that the rest show what it is worth.
                yield Case(family, model.name, model is LLAMA, seconds, predict)
    yield from _all_reduces(profiles, key)


def _gemms(profiles: Path, key: str) -> Iterator[Case]:
    t = _needed(profiles, f"aiconfigurator_{key}_gemm_bf16")
    yield Case(
        "gemm",
        "products of 1,024 to 16,384",
        True,
        t["latency_ms"] / 1e3,
        lambda gpu: gpu.gemm_seconds(t["m"], t["n"], t["k"]),
    )


def _attentions(profiles: Path, key: str) -> Iterator[Case]:
    for family, length, predict in (
        ("decode attention", "context_len", _decode),
        ("prefill attention", "isl", _prefill),
    ):
        table = _needed(profiles, f"aiconfigurator_{key}_{family.replace(' ', '_')}")
        table["length"] = table.pop(length)
        sizes = (table["batch_size"] <= 256) & (table["length"] <= 16384)
        if family == "prefill attention":
            sizes &= table["batch_size"] * table["length"] <= 65536
        multi_head = table["num_heads"] == table["num_key_value_heads"]
        of_128 = table["head_dim"] == 128
        for of, wanted in (
            ("multi-head, size 128", sizes & multi_head & of_128),
            ("multi-head, size 64", sizes & multi_head & ~of_128),
            ("grouped-query, size 128", sizes & ~multi_head & of_128),
        ):
            t = {name: column[wanted] for name, column in table.items()}
            if len(t["length"]):
                fitted = of == "multi-head, size 128"
                yield Case(family, of, fitted, t["latency_ms"] / 1e3, _of(predict, t))


def _decode(gpu: Gpu, t: Table) -> Column:
    blocks = t["num_key_value_heads"] * t["batch_size"]
    numbers = 2 * blocks * t["head_dim"] * t["length"]
    return np.asarray(gpu.decode_attention_seconds(numbers, blocks))


def _prefill(gpu: Gpu, t: Table) -> Column:
    rows = t["batch_size"] * t["length"]
    numbers = 2 * rows * t["head_dim"] * (t["num_heads"] + t["num_key_value_heads"])
    width = t["num_heads"] * t["head_dim"]
    pairs = rows * 0.5 * (t["length"] + 1)
    return np.asarray(gpu.prefill_attention_seconds(pairs, rows, numbers, width))


Timed = tuple[Column, Callable[[Gpu], Column]]


def _operators(model: Profiled, t: Table) -> dict[str, list[Timed]]:
    """Operators of a layer by family: measured seconds and the model's."""
    d, ranks, rows = t["n_embd"], t["num_tensor_parallel_workers"], t["num_tokens"]
    ffn = t["n_expanded_embd"] / ranks
    up = ffn * (2 if model.gated else 1)
    products = {
        "attn_pre_proj": (3 * d / ranks, d),
        "attn_post_proj": (d, d / ranks),
        "mlp_up_proj": (up, d),
        "mlp_down_proj": (d, ffn),
    }
    small = {
        "input_layernorm": 2 * d,
        "post_attention_layernorm": 2 * d,
        "attn_rope": 4 * d / ranks,
        "mlp_act": up + ffn,
        "add": 3 * d,
    }
    return {
        "gemm": [
            (t[f"{name}_ms"] / 1e3, _product(rows, outputs, inputs))
            for name, (outputs, inputs) in products.items()
        ],
        "elementwise": [
            (t[f"{name}_ms"] / 1e3, _small(rows * numbers))
            for name, numbers in small.items()
            if f"{name}_ms" in t
        ],
    }


def _layers(profiles: Path, key: str) -> Iterator[Case]:
    """Whole layers: every operator profiled, alone and with attention."""
    for model in MODELS:
        table = _table(profiles, f"vidur_mlp_{key}_{model.key}")
        if not table:
            continue
        yield _layer(model, table, "layer without attention", None)
        single = _rows(table, table["num_tensor_parallel_workers"] == 1)
        heads = single["n_head"][0]
        prefill = _needed(profiles, f"aiconfigurator_{key}_prefill_attention")
        prefill["length"] = prefill.pop("isl")
        wanted = (prefill["num_heads"] == heads) & (prefill["num_key_value_heads"] == heads)
        wanted &= (prefill["batch_size"] == 1) & (prefill["head_dim"] == 128)
        if single["n_embd"][0] == 128 * heads:
            chunk = _rows(prefill, wanted)
            yield _layer(model, single, "layer of a prefill", _Attention(chunk, "length", _prefill))
            decode = _decode_of_heads(profiles, key, heads)
            attention = _Attention(decode, "batch_size", _decode)
            yield _layer(model, single, "layer of a decode", attention)


def _decode_of_heads(profiles: Path, key: str, heads: float) -> Table:
    """Timings of 8 heads times heads / 8, where they are long enough for that to hold."""
    t = _needed(profiles, f"aiconfigurator_{key}_decode_attention")
    t["length"] = t.pop("context_len")
    wanted = (t["num_heads"] == 8) & (t["num_key_value_heads"] == 8) & (t["head_dim"] == 128)
    # Their floor would be multiplied too, so it has to be small beside them.
    wanted &= (t["batch_size"] * t["length"] >= 65536) & (t["batch_size"] >= 8)
    t = _rows(t, wanted & (t["length"] <= 4096))
    full = np.full(len(t["length"]), heads)
    scaled = t["latency_ms"] * heads / 8
    return {**t, "num_heads": full, "num_key_value_heads": full, "latency_ms": scaled}


@dataclass(frozen=True)
class _Attention:
    """Attention timings to add to a layer's where ``tokens`` says as many as the layer had."""

    table: Table
    tokens: str
    predict: Callable[[Gpu, Table], Column]


def _layer(model: Profiled, table: Table, family: str, attention: _Attention | None) -> Case:
    extra: list[Timed] = []
    if attention is not None:
        at = {int(num): i for i, num in enumerate(table["num_tokens"])}
        known = np.array([int(num) in at for num in attention.table[attention.tokens]])
        t = _rows(attention.table, known)
        table = _rows(table, np.array([at[int(num)] for num in t[attention.tokens]]))
        extra = [(t["latency_ms"] / 1e3, _of(attention.predict, t))]
    parts = [timed for cases in _operators(model, table).values() for timed in cases] + extra
    seconds = np.sum([measured for measured, _ in parts], axis=0)
    return Case(
        family,
        model.name,
        model is LLAMA,
        seconds,
        lambda gpu: np.sum([predict(gpu) for _, predict in parts], axis=0),
    )


def _all_reduces(profiles: Path, key: str) -> Iterator[Case]:
    table = _needed(profiles, f"vidur_allreduce_{key}_dgx")
    for ranks in RANKS:
        # Within one machine: as many devices per node as take part.
        wanted = (table["num_workers"] == ranks) & (table["devices_per_node"] == ranks)
        t = _rows(table, wanted)
        seconds = t["time_stats.all_reduce.median"] / 1e3
        yield Case("all-reduce", f"{ranks} ranks", True, seconds, _link(ranks, t["size"] / 2))


def _of(predict: Callable[[Gpu, Table], Column], t: Table) -> Callable[[Gpu], Column]:
    return lambda gpu: predict(gpu, t)


def _product(rows: Column, outputs: Column, inputs: Column) -> Callable[[Gpu], Column]:
    return lambda gpu: np.asarray(gpu.gemm_seconds(rows, outputs, inputs))


def _small(numbers: Column) -> Callable[[Gpu], Column]:
    return lambda gpu: np.asarray(gpu.elementwise_seconds(1, numbers))


def _link(ranks: int, numbers: Column) -> Callable[[Gpu], Column]:
    return lambda gpu: np.asarray(gpu.all_reduce_seconds(ranks, numbers))


def _joined(parts: list[Callable[[Gpu], Column]]) -> Callable[[Gpu], Column]:
    return lambda gpu: np.concatenate([part(gpu) for part in parts])


def _rows(table: Table, wanted: npt.NDArray[Any]) -> Table:
    return {name: column[wanted] for name, column in table.items()}


def _needed(profiles: Path, name: str) -> Table:
    table = _table(profiles, name)
    if not table:
        raise SystemExit(f"{profiles} has no {name}.csv")
    return table


def _table(profiles: Path, name: str) -> Table:
    """Columns of numbers of a file; nothing where there is no such file."""
    path = profiles / f"{name}.csv"
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    text = {"kernel_source", "collective"}
    return {n: np.array([float(row[n]) for row in rows]) for n in rows[0] if n not in text}
