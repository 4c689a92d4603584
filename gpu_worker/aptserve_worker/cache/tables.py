"""Block tables of all sequences, kept ready to be indexed by a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from aptserve_worker.plan import Tier
from aptserve_worker.transfer import to_device


class BlockTables:
    """For each tier a matrix ``[max_num_seqs, max_blocks, units_per_block]`` of unit numbers.

    A sequence owns one row, the same in every tier; entries past its blocks are 0, which is a valid
    unit number that is never attended to.

    With a ``mirror_device`` there is a second copy of them there, which :meth:`sync_mirrors` brings
    up to date, for steps whose shapes do not depend on the batch.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_blocks: int,
        units_per_block: dict[Tier, int],
        mirror_device: torch.device | None = None,
    ) -> None:
        self.units_per_block = units_per_block
        self._max_num_seqs = max_num_seqs
        self._tables = {
            tier: torch.zeros(max_num_seqs, max_blocks, units, dtype=torch.int64)
            for tier, units in units_per_block.items()
        }
        self.mirrors: dict[Tier, Tensor] = {}
        if mirror_device is not None:
            self.mirrors = {
                t: table.to(mirror_device, copy=True) for t, table in self._tables.items()
            }
        self._changed: dict[Tier, list[tuple[int, int, int]]] = {}
        """By tier: row, first block and number of blocks that the mirror lacks."""
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))

    def take_row(self) -> int | None:
        """A row for a new sequence, or None when all are taken."""
        return self._free_rows.pop() if self._free_rows else None

    def give_row(self, row: int) -> None:
        """The sequence of ``row`` is gone."""
        self._free_rows.append(row)

    def extend(self, tier: Tier, row: int, num_blocks: int, units: list[int]) -> None:
        """Append ``units`` as whole blocks after the first ``num_blocks``."""
        per_block = self.units_per_block[tier]
        added = len(units) // per_block
        table = self._tables[tier][row, num_blocks : num_blocks + added]
        table.copy_(torch.tensor(units, dtype=torch.int64).view(added, per_block))
        if self.mirrors:
            self._changed.setdefault(tier, []).append((row, num_blocks, added))

    def table(self, tier: Tier, row: int, num_blocks: int) -> Tensor:
        """``[num_blocks, units_per_block]`` of one sequence."""
        return self._tables[tier][row, :num_blocks]

    def gather(self, tier: Tier, rows: Tensor, num_blocks: int) -> Tensor:
        """``[len(rows), num_blocks, units_per_block]`` of a batch."""
        return self._tables[tier][:, :num_blocks].index_select(0, rows)

    def units_at(self, tier: Tier, rows: Tensor, blocks: Tensor) -> Tensor:
        """``[n, units_per_block]`` of the blocks ``blocks[i]`` of the sequences ``rows[i]``."""
        return self._tables[tier][rows, blocks]

    def sync_mirrors(self) -> None:
        """Bring the mirrors up to date: one copy to the device and one scatter per tier."""
        for tier, changes in self._changed.items():
            # Of two changes of one block the later is what the table holds; both write that.
            rows = [row for row, _, count in changes for _ in range(count)]
            blocks = [block for _, first, count in changes for block in range(first, first + count)]
            at = torch.tensor([rows, blocks], dtype=torch.int64)
            units = self._tables[tier][at[0], at[1]]
            mirror = self.mirrors[tier]
            packed = to_device(torch.cat((at.t(), units), dim=1), mirror.device)
            mirror[packed[:, 0], packed[:, 1]] = packed[:, 2:]
        self._changed.clear()
