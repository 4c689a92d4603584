"""Turns the sequences of an iteration into the tensors of a flattened batch."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from aptserve_kernels import DecodeBatch, PrefillBatch, WriteSlots
from aptserve_kernels.index import head_rows, kv_slots
from torch import Tensor

from aptserve_worker.cache.tables import BlockTables
from aptserve_worker.model.attention import AttentionStep, DecodeRows, HiddenChunk, PrefillRows
from aptserve_worker.parallel.shard import Shard
from aptserve_worker.plan import Tier
from aptserve_worker.sequences import Sequence
from aptserve_worker.transfer import to_device

_NONE = torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class Part:
    """A sequence's part of an iteration: tokens ``[sequence.num_computed, +num_new)``."""

    sequence: Sequence
    num_new: int

    @property
    def samples(self) -> bool:
        """Whether the part reaches the last token there is."""
        return self.end == self.sequence.num_tokens

    @property
    def is_decode(self) -> bool:
        """One new token after cached ones."""
        return self.num_new == 1 and self.sequence.num_computed > 0

    @property
    def is_prompt(self) -> bool:
        """New tokens after none."""
        return self.sequence.num_computed == 0

    @property
    def end(self) -> int:
        """Tokens of the sequence that are computed afterwards."""
        return self.sequence.num_computed + self.num_new

    @property
    def token_ids(self) -> list[int]:
        """The tokens to compute; the host may not know the last of them, see :func:`filled`."""
        return self.sequence.tokens_to_compute(self.num_new)


@dataclass(frozen=True, slots=True)
class StepInput:
    """A flattened batch. ``sampled``: the parts that get a token, in the order of their logits."""

    token_ids: Tensor
    positions: Tensor
    attention: AttentionStep
    logit_rows: Tensor
    sampled: Seq[Part]


@dataclass(frozen=True, slots=True)
class _Groups:
    """The parts of an iteration in row order; see :class:`AttentionStep`."""

    decodes: dict[Tier, list[Part]]
    prompts: list[Part]
    chunks: dict[Tier, list[Part]]

    @classmethod
    def of(cls, parts: Seq[Part]) -> _Groups:
        decodes = {
            tier: [p for p in parts if p.is_decode and p.sequence.tier is tier] for tier in Tier
        }
        others = [p for p in parts if not p.is_decode]
        prompts = [p for p in others if p.is_prompt]
        # Chunks over hidden states come last: each is worked on by itself.
        order = sorted(Tier, key=lambda tier: tier is Tier.HIDDEN)
        chunks = {
            tier: [p for p in others if not p.is_prompt and p.sequence.tier is tier]
            for tier in order
        }
        return cls(_filled(decodes), prompts, _filled(chunks))

    @property
    def ordered(self) -> list[Part]:
        """All parts in the order of their rows."""
        groups = [*self.decodes.values(), self.prompts, *self.chunks.values()]
        return [part for group in groups for part in group]


def _filled(groups: dict[Tier, list[Part]]) -> dict[Tier, list[Part]]:
    return {tier: parts for tier, parts in groups.items() if parts}


def filled(token_ids: Tensor, table_rows: Tensor, last_tokens: Tensor) -> Tensor:
    """``token_ids`` ``[rows]``, in place of unknown ones the last token of the sequence.

    ``table_rows``: ``[rows]``, the row of each one's sequence in ``last_tokens``.
    """
    return torch.where(token_ids < 0, last_tokens.index_select(0, table_rows), token_ids)


def build_step(
    parts: Seq[Part],
    tables: BlockTables,
    shard: Shard,
    device: torch.device,
    last_tokens: Tensor,
) -> StepInput:
    """Flatten ``parts``, in the row order of :class:`AttentionStep`.

    ``last_tokens``: ``[max_num_seqs]`` on the device, by row of the tables.
    """
    groups = _Groups.of(parts)
    ordered = groups.ordered
    ids: list[int] = []
    positions: list[int] = []
    last_rows: list[int] = []
    for part in ordered:
        ids += part.token_ids
        positions += range(part.sequence.num_computed, part.end)
        last_rows.append(len(ids) - 1)
    sampled = [(row, p) for row, p in zip(last_rows, ordered, strict=True) if p.samples]
    counts = torch.tensor([p.num_new for p in ordered], dtype=torch.int64)
    rows = torch.tensor([p.sequence.row for p in ordered], dtype=torch.int64)
    table_rows = rows.repeat_interleave(counts)
    token_ids = to_device(torch.tensor(ids, dtype=torch.int64), device)
    if any(part.sequence.num_pending for part in ordered):
        token_ids = filled(token_ids, to_device(table_rows, device), last_tokens)
    position_tensor = torch.tensor(positions, dtype=torch.int64)
    tiers = torch.tensor([p.sequence.tier for p in ordered]).repeat_interleave(counts)
    slots = _slots(tiers, table_rows, position_tensor, tables, shard)
    return StepInput(
        token_ids=token_ids,
        positions=to_device(position_tensor, device),
        attention=_Layout(tables, shard, device).attention(groups, _on(device, slots)),
        logit_rows=to_device(torch.tensor([row for row, _ in sampled], dtype=torch.int64), device),
        sampled=[part for _, part in sampled],
    )


class _Layout:
    """Hands out rows of the flattened batch, group by group."""

    def __init__(self, tables: BlockTables, shard: Shard, device: torch.device) -> None:
        self._tables, self._shard, self._device = tables, shard, device
        self._num_rows = 0

    def attention(self, groups: _Groups, slots: WriteSlots) -> AttentionStep:
        """Everything that attention is told; the groups take their rows in this order."""
        return AttentionStep(
            slots=slots,
            decodes={tier: self._decodes(tier, parts) for tier, parts in groups.decodes.items()},
            prompts=self._prompts(groups.prompts) if groups.prompts else None,
            chunks={
                tier: self._chunks(tier, parts)
                for tier, parts in groups.chunks.items()
                if tier is not Tier.HIDDEN
            },
            hidden_chunks=[self._hidden_chunk(p) for p in groups.chunks.get(Tier.HIDDEN, ())],
        )

    def _take(self, parts: Seq[Part]) -> tuple[int, int]:
        start = self._num_rows
        self._num_rows += sum(part.num_new for part in parts)
        return start, self._num_rows

    def _decodes(self, tier: Tier, parts: Seq[Part]) -> DecodeRows:
        lengths = self._ints([part.end for part in parts])
        batch = decode_batch(tier, self._gathered(tier, parts), lengths, self._shard)
        return DecodeRows(*self._take(parts), batch)

    def _prompts(self, parts: Seq[Part]) -> PrefillRows:
        no_tables = torch.zeros(len(parts), 0, 1, dtype=torch.int64, device=self._device)
        batch = self._ragged(parts, no_tables, keys=[part.num_new for part in parts])
        return PrefillRows(*self._take(parts), batch)

    def _chunks(self, tier: Tier, parts: Seq[Part]) -> PrefillRows:
        return PrefillRows(*self._take(parts), self._ragged(parts, self._gathered(tier, parts)))

    def _hidden_chunk(self, part: Part) -> HiddenChunk:
        s = part.sequence
        num_blocks = self._shard.num_blocks(part.end)
        table = to_device(self._tables.table(s.tier, s.row, num_blocks), self._device)
        batch = self._ragged([part], table.unsqueeze(0), keys=[part.end])
        return HiddenChunk(*self._take([part]), s.num_computed, table, batch)

    def _ragged(
        self, parts: Seq[Part], tables: Tensor, keys: Seq[int] | None = None
    ) -> PrefillBatch:
        counts = [part.num_new for part in parts]
        return PrefillBatch(
            query_starts=self._starts(counts),
            lengths=self._ints([part.end for part in parts]),
            tables=tables,
            geometry=self._shard.kv,
            max_queries=max(counts),
            key_starts=None if keys is None else self._starts(keys),
        )

    def _gathered(self, tier: Tier, parts: Seq[Part]) -> Tensor:
        rows = torch.tensor([part.sequence.row for part in parts], dtype=torch.int64)
        num_blocks = self._shard.num_blocks(max(part.end for part in parts))
        return to_device(self._tables.gather(tier, rows, num_blocks), self._device)

    def _starts(self, counts: Seq[int]) -> Tensor:
        starts = torch.zeros(len(counts) + 1, dtype=torch.int64)
        torch.cumsum(torch.tensor(counts, dtype=torch.int64), 0, out=starts[1:])
        return to_device(starts, self._device)

    def _ints(self, values: Seq[int]) -> Tensor:
        return to_device(torch.tensor(values, dtype=torch.int64), self._device)


def _on(device: torch.device, slots: WriteSlots) -> WriteSlots:
    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else to_device(tensor, device)

    return WriteSlots(
        move(slots.kv_rows),
        to_device(slots.key_slots, device),
        to_device(slots.value_slots, device),
        move(slots.hidden_rows),
        to_device(slots.hidden_slots, device),
        move(slots.kv8_rows),
        move(slots.kv8_slots),
    )


def decode_batch(tier: Tier, tables: Tensor, lengths: Tensor, shard: Shard) -> DecodeBatch:
    """What this rank attends to: all tokens of its heads, or its share of the hidden states.

    ``tables``: ``[rows, blocks, units_per_block]``; ``lengths``: ``[rows]``, tokens of each.
    """
    if tier is Tier.HIDDEN:
        return DecodeBatch(tables, shard.count(lengths), shard.hidden)
    return DecodeBatch(tables, lengths, shard.kv)


def _slots(
    tiers: Tensor, table_rows: Tensor, positions: Tensor, tables: BlockTables, shard: Shard
) -> WriteSlots:
    """Cache slots of every row; each tier gets its rows, None meaning all of them.

    ``tiers``, ``table_rows``, ``positions``: ``[rows]``, on the host like the slots.
    """
    block_size = shard.block_size

    def rows_of(chosen: Tensor) -> Tensor | None:
        return None if bool(chosen.all()) else chosen.nonzero().squeeze(1)

    def units_of(tier: Tier, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Units of the block of each row, and the row's position."""
        at = positions if rows is None else positions[rows]
        of = table_rows if rows is None else table_rows[rows]
        return tables.units_at(tier, of, at // block_size), at

    kv_rows, key_slots, value_slots = rows_of(tiers == Tier.KV), _NONE, _NONE
    if kv_rows is None or len(kv_rows):
        units, at = units_of(Tier.KV, kv_rows)
        key_slots, value_slots = kv_slots(units, at % block_size, shard.kv)
    hidden, hidden_slots = rows_of((tiers == Tier.HIDDEN) & shard.holds(positions)), _NONE
    if hidden is None or len(hidden):
        hidden_slots = shard.hidden_slots(*units_of(Tier.HIDDEN, hidden)).view(-1)
    kv8_rows, kv8_slots = rows_of(tiers == Tier.KV8), None
    if kv8_rows is None or len(kv8_rows):
        units, at = units_of(Tier.KV8, kv8_rows)
        kv8_slots = head_rows(units, at % block_size, shard.kv).view(-1)
    return WriteSlots(kv_rows, key_slots, value_slots, hidden, hidden_slots, kv8_rows, kv8_slots)
