"""Decode attention with keys projected from hidden states, values left as hidden states.

    k[j] = rotate_j(norm(W_K x_j + b_K)),   out[h] = Σ_j softmax(cap(scaling · q[h] · k))_j · x_j

Keys and scores in ``projected_scores``, which is nearly all the time; the sum in ``hidden_sum``. A
norm that is no ``HeadNorm`` is applied by torch, to keys that do get written, a sequence at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from aptserve_kernels.batch import AttentionParams, DecodeBatch, HeadNorm, KeyProjection
from aptserve_kernels.gpu import projected_scores
from aptserve_kernels.gpu.hidden_merge import merge_products
from aptserve_kernels.gpu.hidden_sum import weighted_sum
from aptserve_kernels.gpu.hidden_tiles import TileWeights, check_cache, check_rows
from aptserve_kernels.gpu.projected_scores import project_and_score, tile_tokens
from aptserve_kernels.gpu.variants import HEAD_DIMS, KernelVariant
from aptserve_kernels.reference import gather_hidden, project_keys


def decode_projected(
    q: Tensor,
    pool: Tensor,
    batch: DecodeBatch,
    params: AttentionParams,
    projection: KeyProjection,
    log_sums: Tensor | None = None,
) -> Tensor:
    """As :func:`aptserve_kernels.reference.decode_projected`; sequences without tokens give zeros.

    ``q`` has the dtype of the pool and may be any view whose last dimension is contiguous.
    """
    g = batch.geometry
    check_cache(pool, batch)
    check_rows("q", q, pool, batch, g.head_dim)
    _check_projection(q, projection, pool, batch)
    weights = TileWeights.empty(batch, q.shape[1], pool.dtype, tile_tokens(pool.dtype, g.head_dim))
    if projection.norm is None or isinstance(projection.norm, HeadNorm):
        project_and_score(q, pool, batch, params, projection, weights)
    else:
        merge_products(_products(q, pool, batch, projection, weights), weights, batch, params)
    if log_sums is not None:
        weights.write_log_sums(log_sums, batch, params)
    return weighted_sum(weights, pool, batch, params)


def _check_projection(
    q: Tensor, projection: KeyProjection, pool: Tensor, batch: DecodeBatch
) -> None:
    g, weight, bias = batch.geometry, projection.map.weight, projection.map.bias
    if g.head_dim > max(HEAD_DIMS) or g.head_dim % 2 or q.shape[1] % g.num_kv_heads:
        raise ValueError(f"q: {q.shape[1]} heads of {g.head_dim} do not fit {g.num_kv_heads}")
    wanted = g.num_kv_heads * g.head_dim, g.hidden_size
    if weight.shape != wanted or weight.dtype != pool.dtype:
        raise ValueError(f"projection.map.weight: expected {pool.dtype} {wanted}")
    if weight.stride(1) != 1 or weight.stride(0) % 8:
        raise ValueError(f"projection.map.weight: strides {weight.stride()}, expected 8 n and 1")
    if bias is not None and (bias.shape != wanted[:1] or bias.stride(0) != 1):
        raise ValueError(f"projection.map.bias: expected contiguous [{wanted[0]}]")
    rotary, norm = projection.rotary, projection.norm
    if rotary is not None:
        strides = {rotary.cos.stride(), rotary.sin.stride()}
        if len(strides) > 1 or rotary.cos.stride(1) != 1:
            raise ValueError("projection.rotary: cos and sin must lie alike, rows contiguous")
        if rotary.cos.shape[1] % 2 or rotary.cos.shape[1] > g.head_dim:
            raise ValueError(f"projection.rotary: {rotary.cos.shape[1]} elements of {g.head_dim}")
    if isinstance(norm, HeadNorm) and norm.weight.shape != (g.head_dim,):
        raise ValueError(f"projection.norm: expected a weight [{g.head_dim}]")


def _products(
    q: Tensor, pool: Tensor, batch: DecodeBatch, projection: KeyProjection, like: TileWeights
) -> Tensor:
    """Products ``[1, batch, heads, tokens]`` of queries and keys, tokens as in ``like``.

    For all tokens that the tables have room for; those beyond a sequence give anything.
    """
    g = batch.geometry
    num_tokens = batch.tables.shape[1] * g.block_size
    positions = torch.arange(num_tokens, device=pool.device)
    if projection.rotary is not None:
        # The tables may have room beyond the longest position that there is an angle for.
        positions = positions.clamp_max(projection.rotary.cos.shape[0] - 1)
    products = torch.empty(1, *like.weights.shape, device=pool.device)
    for i in range(q.shape[0]):
        x = gather_hidden(pool, batch.tables[i], num_tokens, g)
        keys = project_keys(x, positions, projection, g.head_dim)
        queries = q[i].view(g.num_kv_heads, -1, g.head_dim)
        found = torch.einsum("kgd,lkd->kgl", queries, keys)
        products[0, i, :, :num_tokens] = found.flatten(0, 1)
    return products


def variants() -> Iterator[KernelVariant]:
    """Those of the scores; the kernels that follow are listed by ``decode_hidden``."""
    yield from projected_scores.variants()
