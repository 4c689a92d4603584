"""Choosing tokens, against the rules in plain torch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from aptserve_kernels import sampling
from aptserve_kernels.sampling import Penalties, SamplingBatch, TokenBias
from torch import Tensor

from benchmarks.gpu_check.lab import Check, Checks, Lab, error_of

_EDGE = 1e-6
"""How far from the edge between two tokens a random number may give either; see ``draw``."""

_FILTERS: list[dict[str, float]] = [
    {},
    {"top_k": 1},
    {"top_k": 50},
    {"top_p": 0.4},
    {"top_p": 0.95},
    {"min_p": 0.2},
    {"top_k": 20, "top_p": 0.7},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.1},
]


def batch_of(device: torch.device, rows: int, **chosen: float | list[float]) -> SamplingBatch:
    """All rows alike, but for what is given as a list."""
    values: dict[str, float | list[float]] = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "seed": list(range(rows)),
        "position": 3,
        **chosen,
    }
    dtypes = {"temperature": torch.float32, "top_p": torch.float64, "min_p": torch.float64}
    tensors: dict[str, Any] = {
        name: torch.tensor(
            value if isinstance(value, list) else [value] * rows,
            dtype=dtypes.get(name, torch.int64),
            device=device,
        )
        for name, value in values.items()
    }
    return SamplingBatch(**tensors)


def sample(lab: Lab) -> Checks:
    """The best token, draws under every kind of filter, penalties, bias, counts."""
    for size in lab.pick((7, 50272, 128256), (7, 100)):
        yield Check("sample", f"greedy, {size} tokens", 0.0, partial(_greedy, lab, size))
        for filters in lab.pick(_FILTERS, _FILTERS[-1:]):
            about = ", ".join(f"{name} {value:g}" for name, value in filters.items()) or "plain"
            error = partial(_draw_error, lab, size, filters)
            yield Check("sample", f"{about}, {size} tokens", _EDGE, error)
        yield Check("sample", f"penalties, {size} tokens", _EDGE, partial(_adjust, lab, size))
    yield Check("count_tokens", "padding among rows", 0.0, partial(_count, lab))


def _greedy(lab: Lab, vocab_size: int) -> float:
    """Rows that are wrong, one of ties and some without a finite maximum among them."""
    logits = torch.randn(7, vocab_size, device=lab.device)
    logits[1] = 0.25
    logits[2, -1] = 9.0
    logits[3, -1] = float("nan")
    logits[4, 0] = float("inf")
    logits[5] = -float("inf")
    batch = batch_of(lab.device, 7, temperature=0.0)
    wanted = sampling.sample(logits.clone(), batch)
    got = lab.kernels.sample(logits, batch)
    return float(sum((a != b).sum() for a, b in zip(got, wanted, strict=True)))


def _draw_error(lab: Lab, vocab_size: int, filters: dict[str, float]) -> float:
    """How far the random numbers are from the parts of the tokens that they gave."""
    logits = torch.randn(4, vocab_size, device=lab.device) * 3
    batch = batch_of(lab.device, 4, temperature=[0.1, 1.0, 1.5, 100.0], **filters)
    tokens, is_sound = lab.kernels.sample(logits.clone(), batch)
    if not bool(is_sound.all()):
        return float("inf")
    return max(_distance(logits[i], batch, i, token) for i, token in enumerate(tokens.tolist()))


def _distance(row: Tensor, batch: SamplingBatch, i: int, token: int) -> float:
    kept = sampling.kept_weights(
        row,
        float(batch.temperature[i]),
        int(batch.top_k[i]),
        float(batch.top_p[i]),
        float(batch.min_p[i]),
    )
    if not bool(kept[token] > 0):
        return float("inf")
    ends = kept.cumsum(0).double() / float(kept.sum())
    number = sampling.random_bits(int(batch.seed[i]), int(batch.position[i])) * 2.0**-53
    begin = float(ends[token - 1]) if token else 0.0
    return max(0.0, begin - number, number - float(ends[token]))


def _adjust(lab: Lab, vocab_size: int) -> float:
    """Penalties and bias, on all logits."""
    device = lab.device
    counts = sampling.new_counts(6, vocab_size, device)
    for row in range(6):
        seen = torch.randint(vocab_size, (8 + row,), device=device)
        sampling.set_counts(counts, row, seen[:8], seen[: 2 * row])
    floats = [torch.tensor(x, device=device) for x in ([1.3, 1.0, 0.5], [0, 1.5, 2.0], [0.3, 0, 2])]
    rows = torch.tensor([4, 5, -1], device=device)
    penalties = Penalties(floats[0], floats[1].float(), floats[2].float(), counts, rows)
    bias = TokenBias(
        torch.tensor([0, 2, -1], device=device),
        torch.tensor([vocab_size - 1, 0, 3], device=device),
        torch.tensor([-float("inf"), 2.5, 9.0], device=device),
    )
    batch = batch_of(device, 3, temperature=0.0)
    batch = replace(batch, penalties=penalties, bias=bias)
    logits = torch.randn(3, vocab_size, device=device) * 5
    wanted = logits.clone()
    sampling.sample(wanted, batch)
    lab.kernels.sample(logits, batch)
    return error_of(logits, wanted)


def _count(lab: Lab) -> float:
    """Counts that are wrong, one of them full already."""
    counts = sampling.new_counts(300, 1000, lab.device)
    counts[3, 5] = 2 * sampling.MAX_COUNT + 1
    rows = torch.randperm(300, device=lab.device)
    rows[::7] = -1
    token_ids = torch.randint(1000, (300,), device=lab.device)
    token_ids[rows == 3] = 5
    wanted = counts.clone()
    sampling.count_tokens(wanted, rows, token_ids)
    lab.kernels.count_tokens(counts, rows, token_ids)
    return float((counts != wanted).sum())
