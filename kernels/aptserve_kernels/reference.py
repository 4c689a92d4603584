"""The plain torch form of every operation: the definition that other implementations must match.

Written for clarity, one sequence after the other; any device, any floating dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aptserve_kernels.batch import (
    AttentionParams,
    DecodeBatch,
    KeyProjection,
    PrefillBatch,
    Rotary,
    WriteSlots,
)
from aptserve_kernels.geometry import UnitGeometry
from aptserve_kernels.quantised import gather_kv8

Attend = Callable[[Tensor, Tensor, Tensor, AttentionParams], Tensor]
"""Attention of one sequence, such as :func:`attend`."""


def write_cache(pool: Tensor, k: Tensor, v: Tensor, x: Tensor | None, slots: WriteSlots) -> None:
    """Store new tokens: K and V of the rows in the KV tier, hidden states of the others.

    ``pool``: ``[num_units, block_size, unit_width]``; ``k``, ``v``: ``[rows, num_kv_heads,
    head_dim]``; ``x``: ``[rows, hidden_size]``, needed when there are hidden rows. Nothing is
    stored where the slot of a padded batch is negative.
    """
    if slots.key_slots.numel():
        head_dim = k.shape[-1]
        if slots.kv_rows is not None:
            k, v = k.index_select(0, slots.kv_rows), v.index_select(0, slots.kv_rows)
        rows = pool.view(-1, head_dim)
        _store(rows, slots.key_slots, k.reshape(-1, head_dim), slots.is_padded)
        _store(rows, slots.value_slots, v.reshape(-1, head_dim), slots.is_padded)
    if slots.hidden_slots.numel():
        assert x is not None, "hidden rows need the layer input"
        if slots.hidden_rows is not None:
            x = x.index_select(0, slots.hidden_rows)
        width = pool.shape[-1]
        _store(pool.view(-1, width), slots.hidden_slots, x.reshape(-1, width), slots.is_padded)


def _store(rows: Tensor, slots: Tensor, vectors: Tensor, is_padded: bool) -> None:
    if is_padded:
        real = slots >= 0
        slots, vectors = slots[real], vectors[real]
    rows.index_copy_(0, slots, vectors)


def gather_kv(
    pool: Tensor, table: Tensor, num_tokens: int, geometry: UnitGeometry
) -> tuple[Tensor, Tensor]:
    """K and V, each ``[num_tokens, num_kv_heads, head_dim]``; ``table``: ``[blocks, kv_units]``."""
    units = pool.index_select(0, table.reshape(-1))
    g = geometry
    parts = units.view(-1, 2, g.key_units, g.heads_per_unit, g.block_size, g.head_dim)
    ordered = parts.permute(1, 0, 4, 2, 3, 5)  # [2, blocks, block_size, units, heads, head_dim]
    both = ordered.reshape(2, -1, g.num_kv_heads, g.head_dim)[:, :num_tokens]
    return both[0], both[1]


def gather_hidden(pool: Tensor, table: Tensor, num_tokens: int, geometry: UnitGeometry) -> Tensor:
    """Hidden states ``[num_tokens, hidden_size]`` of ``table`` ``[blocks, hidden_units]``."""
    units = pool.index_select(0, table.reshape(-1))
    if geometry.hidden_units == 1:
        return units.view(-1, geometry.hidden_size)[:num_tokens]
    parts = units.view(-1, geometry.hidden_units, geometry.block_size, geometry.unit_width)
    return parts.transpose(1, 2).reshape(-1, geometry.hidden_size)[:num_tokens]


def rotate(k: Tensor, positions: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding of ``[tokens, heads, head_dim]`` (Su et al., arXiv 2104.09864)."""
    cos = rotary.cos.index_select(0, positions).unsqueeze(1).to(k.dtype)
    sin = rotary.sin.index_select(0, positions).unsqueeze(1).to(k.dtype)
    size = cos.shape[-1]
    turned, rest = k[..., :size], k[..., size:]
    if rotary.interleaved:
        partner = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        partner = torch.cat((-turned[..., size // 2 :], turned[..., : size // 2]), dim=-1)
    turned = turned * cos + partner * sin
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)


def project_keys(x: Tensor, positions: Tensor, projection: KeyProjection, head_dim: int) -> Tensor:
    """Keys ``[tokens, num_kv_heads, head_dim]`` of hidden states ``[tokens, hidden_size]``."""
    k = projection.map(x).view(x.shape[0], projection.map.weight.shape[0] // head_dim, head_dim)
    if projection.norm is not None:
        k = projection.norm(k)
    if projection.rotary is not None:
        k = rotate(k, positions, projection.rotary)
    return k


def attend(q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
    """Causal attention of the last ``n`` of ``L`` tokens over all of them.

    ``q``: ``[n, heads, head_dim]``; ``k``, ``v``: ``[L, num_kv_heads, head_dim]``, L >= n. Returns
    ``[n, heads, head_dim]``. Softmax in float32 or wider.
    """
    n, heads, _ = q.shape
    length, kv_heads, _ = k.shape
    group = heads // kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("nhd,lhd->hnl", q, k) * params.scaling
    scores = cap(scores, params.softcap).masked_fill(
        ~causal_mask(n, length, params.window, q.device), float("-inf")
    )
    wide = torch.promote_types(scores.dtype, torch.float32)
    probabilities = scores.softmax(-1, dtype=wide).to(v.dtype)
    return torch.einsum("hnl,lhd->nhd", probabilities, v)


def cap(scores: Tensor, softcap: float | None) -> Tensor:
    """``softcap · tanh(scores / softcap)``, or the scores as they are."""
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def causal_mask(n: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """``[n, length]``: which keys each of the last ``n`` positions sees.

    Row i stands at position p = length - n + i and sees (p - window, p].
    """
    positions = torch.arange(length - n, length, device=device).unsqueeze(1)
    keys = torch.arange(length, device=device)
    seen = keys <= positions
    return seen if window is None else seen & (keys > positions - window)


def decode_kv(q: Tensor, pool: Tensor, batch: DecodeBatch, params: AttentionParams) -> Tensor:
    """Attention of one query row per sequence over its keys and values.

    ``q``: ``[batch, heads, head_dim]``. Returns the same shape.
    """
    out = torch.zeros_like(q)
    for i, length in _occupied(batch):
        k, v = gather_kv(pool, _blocks(batch, i, length), length, batch.geometry)
        out[i] = attend(q[i : i + 1], k, v, params)[0]
    return out


def decode_kv8(
    q: Tensor,
    pool: Tensor,
    scales: Tensor,
    batch: DecodeBatch,
    params: AttentionParams,
    code_dtype: torch.dtype,
    attend: Attend = attend,
) -> Tensor:
    """As :func:`decode_kv`, over keys and values held as codes.

    ``scales`` and ``code_dtype``: see :mod:`aptserve_kernels.quantised`. The tables of the batch
    have ``key_units`` units per block.
    """
    out = torch.zeros_like(q)
    g = batch.geometry
    for i, length in _occupied(batch):
        k, v = gather_kv8(pool, scales, _blocks(batch, i, length), length, g, code_dtype)
        out[i] = attend(q[i : i + 1], k, v, params)[0]
    return out


def prefill_kv(
    q: Tensor,
    pool: Tensor,
    batch: PrefillBatch,
    params: AttentionParams,
    attend: Attend = attend,
) -> Tensor:
    """Causal attention of new tokens, whose keys and values are in the pool by now.

    ``q``: ``[rows, heads, head_dim]``, all sequences after each other. Returns the same shape.
    ``attend``: attention of one sequence; here as in the operations below.
    """
    g = batch.geometry
    return _attend_each(
        q, batch, params, attend, lambda i, n: gather_kv(pool, _blocks(batch, i, n), n, g)
    )


def prefill_kv8(
    q: Tensor,
    pool: Tensor,
    scales: Tensor,
    batch: PrefillBatch,
    params: AttentionParams,
    code_dtype: torch.dtype,
    attend: Attend = attend,
) -> Tensor:
    """As :func:`prefill_kv`, over keys and values held as codes; see :func:`decode_kv8`."""
    g = batch.geometry
    return _attend_each(
        q,
        batch,
        params,
        attend,
        lambda i, n: gather_kv8(pool, scales, _blocks(batch, i, n), n, g, code_dtype),
    )


def attend_ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: PrefillBatch,
    params: AttentionParams,
    attend: Attend = attend,
) -> Tensor:
    """As :func:`prefill_kv`, over ``k``, ``v`` ``[keys, num_kv_heads, head_dim]``.

    The keys of sequence i are the ``lengths[i]`` from ``key_starts[i]`` on.
    """
    assert batch.key_starts is not None, "keys without blocks need their starts"
    starts = batch.key_starts.tolist()
    return _attend_each(
        q, batch, params, attend, lambda i, n: (k[starts[i] :][:n], v[starts[i] :][:n])
    )


def _attend_each(
    q: Tensor,
    batch: PrefillBatch,
    params: AttentionParams,
    attend: Attend,
    keys_and_values: Callable[[int, int], tuple[Tensor, Tensor]],
) -> Tensor:
    out = torch.zeros_like(q)
    starts = batch.query_starts.tolist()
    for i, length in _occupied(batch):
        rows = slice(starts[i], starts[i + 1])
        out[rows] = attend(q[rows], *keys_and_values(i, length), params)
    return out


def decode_hidden(
    folded: Tensor,
    pool: Tensor,
    batch: DecodeBatch,
    params: AttentionParams,
    log_sums: Tensor | None = None,
) -> Tensor:
    """Attention of folded queries over hidden states, which serve as keys and as values.

    ``folded``: ``[batch, heads, hidden_size]``, the query of each head times its key weights.
    Returns ``[batch, heads, hidden_size]``, to be unfolded by the value weights.

    ``log_sums``: ``[batch, heads]`` float32, filled with the logarithm of the sum of exponentials
    of each row's scores, -inf where there are none: what :func:`join_parts` needs.
    """
    return _decode_states(folded, folded, pool, batch, params, log_sums, lambda x: x.unsqueeze(1))


def decode_projected(
    q: Tensor,
    pool: Tensor,
    batch: DecodeBatch,
    params: AttentionParams,
    projection: KeyProjection,
    log_sums: Tensor | None = None,
) -> Tensor:
    """Attention with keys projected from hidden states, values left as hidden states.

    ``q``: ``[batch, heads, head_dim]``. Returns ``[batch, heads, hidden_size]``, to be unfolded by
    the value weights. ``log_sums``: see :func:`decode_hidden`.
    """
    g = batch.geometry
    out = q.new_zeros(q.shape[0], q.shape[1], g.hidden_size)

    def keys(x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[0], device=x.device)
        return project_keys(x, positions, projection, g.head_dim)

    return _decode_states(q, out, pool, batch, params, log_sums, keys)


def _decode_states(
    q: Tensor,
    like: Tensor,
    pool: Tensor,
    batch: DecodeBatch,
    params: AttentionParams,
    log_sums: Tensor | None,
    keys_of: Callable[[Tensor], Tensor],
) -> Tensor:
    """Sums of hidden states weighted by the scores of ``q`` against keys made from them.

    ``keys_of``: from hidden states ``[tokens, hidden_size]`` to keys ``[tokens, key_heads, size]``.
    """
    out = torch.zeros_like(like)
    if log_sums is not None:
        log_sums.fill_(float("-inf"))
    for i, length in _occupied(batch):
        x = gather_hidden(pool, _blocks(batch, i, length), length, batch.geometry)
        keys = keys_of(x)
        keys = keys.repeat_interleave(q.shape[1] // keys.shape[1], 1)
        scores = cap(torch.einsum("hd,lhd->hl", q[i], keys) * params.scaling, params.softcap)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(
            ~causal_mask(1, length, params.window, x.device), float("-inf")
        )
        if log_sums is not None:
            log_sums[i] = scores.logsumexp(-1)
        out[i] = scores.softmax(-1).to(x.dtype) @ x
    return out


def join_parts(parts: Tensor, log_sums: Tensor) -> Tensor:
    """Attention over a context from attention over disjoint parts of it.

    ``parts``: ``[parts, rows, heads, width]``, ``log_sums``: ``[parts, rows, heads]``, see
    :func:`decode_hidden`. Returns ``[rows, heads, width]``; zeros where no part has a token.
    """
    largest = log_sums.amax(0).clamp_min(torch.finfo(log_sums.dtype).min)
    shares = (log_sums - largest).exp()
    shares = shares / shares.sum(0).clamp_min(torch.finfo(shares.dtype).tiny)
    return (shares.unsqueeze(-1) * parts).sum(0)


def fold_queries(q: Tensor, key_weight: Tensor) -> Tensor:
    """Queries times key weights: ``W_Kᵀ q`` per head.

    ``q``: ``[batch, heads, head_dim]``; ``key_weight``: ``[heads, head_dim, hidden_size]``. Returns
    ``[batch, heads, hidden_size]``. The key bias adds the same to every score of a row and so drops
    out of the softmax; it may be left out only where no soft-cap follows.
    """
    return torch.bmm(q.transpose(0, 1), key_weight).transpose(0, 1)


def unfold_values(mixed: Tensor, value_weight: Tensor, value_bias: Tensor | None) -> Tensor:
    """Attention outputs from weighted sums of hidden states: ``W_V (Σ p x) + b_V`` per head.

    ``mixed``: ``[batch, heads, hidden_size]``; ``value_weight``: ``[heads, hidden_size,
    head_dim]``; ``value_bias``: ``[heads, head_dim]``. Returns ``[batch, heads, head_dim]``.
    """
    out = torch.bmm(mixed.transpose(0, 1), value_weight).transpose(0, 1)
    return out if value_bias is None else out + value_bias


def _occupied(batch: DecodeBatch | PrefillBatch) -> list[tuple[int, int]]:
    """Number and length of each sequence that is no padding."""
    return [(i, length) for i, length in enumerate(batch.lengths.tolist()) if length]


def _blocks(batch: DecodeBatch | PrefillBatch, i: int, length: int) -> Tensor:
    return batch.tables[i, : batch.geometry.num_blocks(length)]
