"""Decode steps of fixed shapes, recorded once and replayed.

Launching the kernels of a decode step one by one takes the host longer than they run, so a GPU
waits. A CUDA graph launches all of them at once, but fixes every shape and address. Steps are
therefore padded to a few numbers of rows per tier, and read what they need from buffers: a token, a
length and a table row for each sequence. A token that the host does not know yet is found by the
row. Where its new entries go and which blocks it attends to
follow from those on the device. A padding row has length 0: it writes nothing and attends to
nothing.
"""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog
import torch
from aptserve_kernels import WriteSlots
from aptserve_kernels.index import head_rows, kv_slots
from torch import Tensor

from aptserve_worker.cache.tables import BlockTables
from aptserve_worker.model.attention import AttentionStep, DecodeRows
from aptserve_worker.model.step import Part, decode_batch, filled
from aptserve_worker.parallel.shard import Shard
from aptserve_worker.plan import Tier
from aptserve_worker.transfer import copy_to_device, no_waiting, to_device

log = structlog.get_logger(__name__)

Shape = tuple[tuple[Tier, int], ...]
"""Rows of each tier that a step has, padding included; in row order."""
Forward = Callable[[Tensor, Tensor, AttentionStep, Tensor], Tensor]
"""See :meth:`aptserve_worker.model.runner.ModelRunner.forward`."""
Recorder = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""From a step to something that does it again; the result is the same tensor each time."""

_FEW_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_MIXED_ROWS = (8, 32, 128, 512)
"""Coarser where two tiers share a step: every pair is a graph."""


@dataclass(frozen=True, slots=True)
class _Step:
    """A recorded step: its buffers and how to run it."""

    shape: Shape
    inputs: Tensor
    """``[3, rows]`` int64: tokens, lengths and table rows."""
    replay: Callable[[], Tensor]


@dataclass(slots=True)
class DecodeGraphs:
    """Runs decode steps through recorded ones, where there is one that is large enough."""

    forward: Forward
    tables: BlockTables
    last_tokens: Tensor
    """``[max_num_seqs]``: the last token of each sequence, by table row, where a step finds those
    that the host does not know."""
    shard: Shard
    device: torch.device
    max_num_seqs: int
    record: Recorder
    _steps: dict[Shape, _Step] = field(default_factory=dict)
    _logits: Tensor | None = None
    """``[rows of the largest step, vocab_size]``: where every step leaves its logits. With a result
    of its own each would keep rows times vocabulary for itself, a GiB and more in all."""

    def record_all(self) -> None:
        """Record every shape there is, the largest first, so that the others share its memory."""
        started = time.perf_counter()
        shapes = sorted(self._shapes(), key=_num_rows, reverse=True)
        for shape in shapes:
            self._steps[shape] = self._recorded(shape)
        seconds = round(time.perf_counter() - started, 1)
        log.info("graphs.recorded", num_graphs=len(shapes), seconds=seconds)

    def run(self, parts: Sequence[Part]) -> tuple[Tensor, list[Part]] | None:
        """Logits ``[len(parts), vocab_size]`` float32 and the parts in the order of their rows.

        None when no recorded step fits: a prompt is among them, or too many tiers are.
        """
        if not all(part.is_decode and part.samples for part in parts):
            return None
        by_tier = {tier: [p for p in parts if p.sequence.tier is tier] for tier in Tier}
        by_tier = {tier: some for tier, some in by_tier.items() if some}
        step = self._steps.get(self._shape_for({t: len(some) for t, some in by_tier.items()}))
        if step is None:
            return None
        rows = self._fill(step, by_tier)
        logits = step.replay()
        ordered = [part for some in by_tier.values() for part in some]
        if rows == list(range(len(rows))):
            return logits[: len(rows)], ordered
        return logits.index_select(0, to_device(torch.tensor(rows), self.device)), ordered

    def _fill(self, step: _Step, by_tier: Mapping[Tier, Sequence[Part]]) -> list[int]:
        """Tell the step about its sequences; returns their rows."""
        host = torch.zeros(step.inputs.shape, dtype=torch.int64)
        rows: list[int] = []
        start = 0
        for tier, count in step.shape:
            parts = by_tier[tier]
            values = [
                [token for p in parts for token in p.token_ids],
                [p.end for p in parts],
                [p.sequence.row for p in parts],
            ]
            host[:, start : start + len(parts)] = torch.tensor(values, dtype=torch.int64)
            rows += range(start, start + len(parts))
            start += count
        self.tables.sync_mirrors()
        copy_to_device(host, step.inputs)
        return rows

    def _recorded(self, shape: Shape) -> _Step:
        num_rows = _num_rows(shape)
        inputs = torch.zeros(3, num_rows, dtype=torch.int64, device=self.device)
        all_rows = torch.arange(num_rows, device=self.device)

        def step() -> Tensor:
            token_ids, lengths, table_rows = inputs
            token_ids = filled(token_ids, table_rows, self.last_tokens)
            attention = self._attention(shape, lengths, table_rows)
            logits = self.forward(token_ids, (lengths - 1).clamp_min(0), attention, all_rows)
            return self._kept(logits)

        return _Step(shape, inputs, self.record(step))

    def _kept(self, logits: Tensor) -> Tensor:
        """``logits`` at the place that all steps share; there until the next step runs."""
        if self._logits is None:
            most_rows = max(map(_num_rows, self._shapes()))
            self._logits = logits.new_empty(most_rows, logits.shape[1])
        return self._logits[: len(logits)].copy_(logits)

    def _attention(self, shape: Shape, lengths: Tensor, table_rows: Tensor) -> AttentionStep:
        decodes: dict[Tier, DecodeRows] = {}
        slots: dict[Tier, tuple[Tensor, Tensor]] = {}
        start = 0
        for tier, count in shape:
            rows = slice(start, start + count)
            tables = self.tables.mirrors[tier].index_select(0, table_rows[rows])
            batch = decode_batch(tier, tables, lengths[rows], self.shard)
            decodes[tier] = DecodeRows(rows.start, rows.stop, batch)
            slots[tier] = self._slots(tier, tables, lengths[rows])
            start += count
        return AttentionStep(self._write_slots(shape, slots), decodes)

    def _slots(self, tier: Tier, tables: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Where each row's new entry goes, -1 for padding; K and V apart, else the same twice."""
        shard, exists = self.shard, lengths > 0
        positions = (lengths - 1).clamp_min(0)
        blocks = (positions // shard.block_size).view(-1, 1, 1).expand(-1, 1, tables.shape[2])
        units = tables.gather(1, blocks).squeeze(1)
        offsets = positions % shard.block_size
        if tier is Tier.KV:
            first, second = kv_slots(units, offsets, shard.kv)
        elif tier is Tier.HIDDEN:
            exists = exists & shard.holds(positions)
            first = second = shard.hidden_slots(units, positions).view(-1)
        else:
            first = second = head_rows(units, offsets, shard.kv).view(-1)
        exists = exists.repeat_interleave(first.numel() // lengths.numel())
        return torch.where(exists, first, -1), torch.where(exists, second, -1)

    def _write_slots(self, shape: Shape, slots: Mapping[Tier, tuple[Tensor, Tensor]]) -> WriteSlots:
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        rows: dict[Tier, Tensor | None] = dict.fromkeys(Tier, none)
        start = 0
        for tier, count in shape:
            rows[tier] = torch.arange(start, start + count, device=self.device)
            start += count
        if len(shape) == 1:
            rows[shape[0][0]] = None
        keys, values = slots.get(Tier.KV, (none, none))
        return WriteSlots(
            kv_rows=rows[Tier.KV],
            key_slots=keys,
            value_slots=values,
            hidden_rows=rows[Tier.HIDDEN],
            hidden_slots=slots.get(Tier.HIDDEN, (none, none))[0],
            kv8_rows=rows[Tier.KV8],
            kv8_slots=slots[Tier.KV8][0] if Tier.KV8 in slots else None,
            is_padded=True,
        )

    def _shapes(self) -> list[Shape]:
        tiers = sorted(self.tables.mirrors)
        alone = [((tier, count),) for tier in tiers for count in self._counts(_FEW_ROWS)]
        counts = self._counts(_MIXED_ROWS)
        least = dict(zip(counts, (1, *(count + 1 for count in counts)), strict=False))
        pairs = [
            ((one, first), (other, second))
            for one, other in itertools.combinations(tiers, 2)
            for first, second in itertools.product(counts, repeat=2)
            if least[first] + least[second] <= self.max_num_seqs  # else no batch is padded to it
        ]
        return [*alone, *pairs]

    def _shape_for(self, counts: Mapping[Tier, int]) -> Shape:
        buckets = self._counts(_FEW_ROWS if len(counts) == 1 else _MIXED_ROWS)
        return tuple((tier, _at_least(count, buckets)) for tier, count in counts.items())

    def _counts(self, buckets: tuple[int, ...]) -> list[int]:
        """Numbers of rows up to the most there can be, that one included."""
        most = min(self.max_num_seqs, buckets[-1])
        return [*(count for count in buckets if count < most), most]


def _num_rows(shape: Shape) -> int:
    """Rows of all tiers together."""
    return sum(count for _, count in shape)


def _at_least(count: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds ``count``; ``count`` itself where none does."""
    at = bisect_left(buckets, count)
    return buckets[at] if at < len(buckets) else count


def without_recording(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A recorder that runs the padded step as it is; on any device."""
    return step


class CudaRecorder:
    """Records steps as CUDA graphs that share one pool of scratch memory.

    They share a stream as well: torch keeps free memory for each stream apart, and cuBLAS a
    workspace for each that it has worked on, 32 MiB on an H100.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._may_wait = True

    def __call__(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Run once, which compiles what has to be, then record.

        Raises RuntimeError where the step waits for the device, before anything is recorded: all
        steps of a model are alike, so the first one tells.
        """
        stream, current = self._stream, torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream), torch.inference_mode():
            step()
            if self._may_wait:
                with no_waiting():
                    step()
                self._may_wait = False
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Inference mode begins after the recording: with it torch makes tensors that all graphs
        # share, and those of inference mode could not be updated by a replay outside of it. The
        # outer stream is for a recording that fails: torch would go on with the inner one.
        with (
            torch.cuda.stream(current),
            torch.cuda.graph(graph, pool=self._pool, stream=stream),
            torch.inference_mode(),
        ):
            out = step()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay
