"""Turns the sequences of an iteration into the tensors of a flattened batch."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from aptserve_kernels import DecodeBatch, UnitGeometry, WriteSlots
from aptserve_kernels.index import head_rows, hidden_rows, split_kv
from torch import Tensor

from aptserve_worker.cache.tables import BlockTables
from aptserve_worker.model.attention import AttentionStep, DecodeRows, PrefillRows
from aptserve_worker.plan import Tier
from aptserve_worker.sequences import Sequence

_NONE = torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class Part:
    """A sequence's part of an iteration: tokens ``[sequence.num_computed, +num_new)``."""

    sequence: Sequence
    num_new: int

    @property
    def samples(self) -> bool:
        """Whether the part reaches the last known token."""
        return self.sequence.num_computed + self.num_new == len(self.sequence.token_ids)

    @property
    def is_decode(self) -> bool:
        """One new token after cached ones."""
        return self.num_new == 1 and self.sequence.num_computed > 0


@dataclass(frozen=True, slots=True)
class StepInput:
    """A flattened batch. ``sampled``: the parts that get a token, in the order of their logits."""

    token_ids: Tensor
    positions: Tensor
    attention: AttentionStep
    logit_rows: Tensor
    sampled: Seq[Part]


def build_step(
    parts: Seq[Part], tables: BlockTables, geometry: UnitGeometry, device: torch.device
) -> StepInput:
    """Flatten ``parts`` in the row order KV decodes, hidden decodes, prefills."""
    kv = [p for p in parts if p.is_decode and p.sequence.tier is Tier.KV]
    hidden = [p for p in parts if p.is_decode and p.sequence.tier is Tier.HIDDEN]
    prefills = [p for p in parts if not p.is_decode]
    ordered = [*kv, *hidden, *prefills]
    token_ids: list[int] = []
    positions: list[int] = []
    last_rows: list[int] = []
    for part in ordered:
        start, stop = part.sequence.num_computed, part.sequence.num_computed + part.num_new
        token_ids += part.sequence.token_ids[start:stop]
        positions += range(start, stop)
        last_rows.append(len(token_ids) - 1)
    sampled = [(row, p) for row, p in zip(last_rows, ordered, strict=True) if p.samples]
    position_tensor = torch.tensor(positions, dtype=torch.int64)
    return StepInput(
        token_ids=torch.tensor(token_ids, dtype=torch.int64).to(device),
        positions=position_tensor.to(device),
        attention=AttentionStep(
            slots=_on(device, _slots(ordered, position_tensor, tables, geometry)),
            kv_decodes=_decode_rows(kv, 0, Tier.KV, tables, geometry, device),
            hidden_decodes=_decode_rows(hidden, len(kv), Tier.HIDDEN, tables, geometry, device),
            prefills=_prefill_rows(prefills, len(kv) + len(hidden), tables, device),
        ),
        logit_rows=torch.tensor([row for row, _ in sampled], dtype=torch.int64).to(device),
        sampled=[part for _, part in sampled],
    )


def _decode_rows(
    parts: Seq[Part],
    start: int,
    tier: Tier,
    tables: BlockTables,
    geometry: UnitGeometry,
    device: torch.device,
) -> DecodeRows | None:
    if not parts:
        return None
    lengths = [p.sequence.num_computed + 1 for p in parts]
    rows = torch.tensor([p.sequence.row for p in parts], dtype=torch.int64)
    batch = DecodeBatch(
        tables.gather(tier, rows, geometry.num_blocks(max(lengths))).to(device),
        torch.tensor(lengths, dtype=torch.int64).to(device),
        geometry,
    )
    return DecodeRows(start, start + len(parts), batch)


def _prefill_rows(
    parts: Seq[Part], start: int, tables: BlockTables, device: torch.device
) -> list[PrefillRows]:
    rows = []
    for part in parts:
        s = part.sequence
        table = tables.table(s.tier, s.row, s.num_blocks).to(device)
        rows.append(PrefillRows(start, start + part.num_new, s.num_computed, s.tier, table))
        start += part.num_new
    return rows


def _on(device: torch.device, slots: WriteSlots) -> WriteSlots:
    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    return WriteSlots(
        move(slots.kv_rows),
        slots.key_slots.to(device),
        slots.value_slots.to(device),
        move(slots.hidden_rows),
        slots.hidden_slots.to(device),
    )


def _slots(
    ordered: Seq[Part], positions: Tensor, tables: BlockTables, geometry: UnitGeometry
) -> WriteSlots:
    """Cache slots of every row; each tier gets its rows, None meaning all of them."""
    counts = torch.tensor([p.num_new for p in ordered], dtype=torch.int64)
    table_rows = torch.tensor([p.sequence.row for p in ordered], dtype=torch.int64)
    table_rows = table_rows.repeat_interleave(counts)
    in_kv = [p.sequence.tier is Tier.KV for p in ordered]
    if all(in_kv):
        keys, values = _kv_slots(table_rows, positions, tables, geometry)
        return WriteSlots(None, keys, values, None, _NONE)
    if not any(in_kv):
        return WriteSlots(
            None, _NONE, _NONE, None, _hidden_slots(table_rows, positions, tables, geometry)
        )
    is_kv = torch.tensor(in_kv).repeat_interleave(counts)
    kv_rows, other_rows = is_kv.nonzero().squeeze(1), (~is_kv).nonzero().squeeze(1)
    keys, values = _kv_slots(table_rows[kv_rows], positions[kv_rows], tables, geometry)
    hidden = _hidden_slots(table_rows[other_rows], positions[other_rows], tables, geometry)
    return WriteSlots(kv_rows, keys, values, other_rows, hidden)


def _kv_slots(
    table_rows: Tensor, positions: Tensor, tables: BlockTables, geometry: UnitGeometry
) -> tuple[Tensor, Tensor]:
    units = tables.units_at(Tier.KV, table_rows, positions // geometry.block_size)
    return kv_slots(units, positions % geometry.block_size, geometry)


def kv_slots(units: Tensor, offsets: Tensor, geometry: UnitGeometry) -> tuple[Tensor, Tensor]:
    """Key and value slots of tokens at ``offsets`` in blocks ``units`` ``[tokens, kv_units]``."""
    key_units, value_units = split_kv(units, geometry)
    return (
        head_rows(key_units, offsets, geometry).view(-1),
        head_rows(value_units, offsets, geometry).view(-1),
    )


def _hidden_slots(
    table_rows: Tensor, positions: Tensor, tables: BlockTables, geometry: UnitGeometry
) -> Tensor:
    units = tables.units_at(Tier.HIDDEN, table_rows, positions // geometry.block_size)
    return hidden_rows(units, positions % geometry.block_size, geometry).view(-1)
