"""Moving one sequence from the hidden tier to the KV tier, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from aptserve_kernels.batch import KeyProjection, LinearMap, WriteSlots
from aptserve_kernels.geometry import UnitGeometry
from aptserve_kernels.index import kv_slots
from aptserve_kernels.reference import gather_hidden, project_keys, write_cache


def promote(
    pool: Tensor,
    hidden_table: Tensor,
    kv_table: Tensor,
    num_tokens: int,
    key: KeyProjection,
    value: LinearMap,
    geometry: UnitGeometry,
) -> None:
    """Replace the cached hidden states of a layer by the keys and values that follow from them.

    ``hidden_table``: ``[blocks, hidden_units]``, ``kv_table``: ``[blocks, kv_units]``. They may
    share units: all is read before anything is written. Token i stands at position i.
    """
    g = geometry
    x = gather_hidden(pool, hidden_table, num_tokens, g)
    tokens = torch.arange(x.shape[0], device=pool.device)
    k = project_keys(x, tokens, key, g.head_dim)
    v = value(x).view(-1, g.num_kv_heads, g.head_dim)
    slots = kv_slots(kv_table[tokens // g.block_size], tokens % g.block_size, g)
    write_cache(pool, k, v, None, WriteSlots(None, *slots, None, tokens.new_zeros(0)))
