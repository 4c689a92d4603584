"""The engine: a plan in, tokens out."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import structlog
import torch
from torch import Tensor

from aptserve_worker.cache.allocator import UnitAllocator
from aptserve_worker.cache.tables import BlockTables
from aptserve_worker.calibration import UNCALIBRATED, Measured, Runner, Shape, calibrate
from aptserve_worker.model.graphs import CudaRecorder, DecodeGraphs, without_recording
from aptserve_worker.model.loading import LoadedModel, load_model
from aptserve_worker.model.runner import ModelRunner, PoolSettings
from aptserve_worker.model.scratch import Limits
from aptserve_worker.model.step import Part, build_step
from aptserve_worker.parallel.group import ALONE, RankGroup
from aptserve_worker.plan import (
    BatchPlan,
    EngineInfo,
    FinishReason,
    NewSequence,
    PlanError,
    ScheduledSequence,
    SequenceOutput,
    StepOutput,
    Tier,
    TierInfo,
)
from aptserve_worker.sampling import Sampled, Sampler
from aptserve_worker.sequences import Sequence

if TYPE_CHECKING:  # who brings settings of its own needs not what reads them from the environment
    from aptserve_worker.config import WorkerSettings

log = structlog.get_logger(__name__)

_CODE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class ModelEngine:
    """Runs plans on one model; implements :class:`aptserve_worker.plan.Engine`."""

    def __init__(
        self, loaded: LoadedModel, settings: WorkerSettings, group: RankGroup = ALONE
    ) -> None:
        """Attach caches to ``loaded``, of a group of ranks to this one's part of it.

        Raises :class:`UnsupportedModelError`.
        """
        self._loaded, self._group = loaded, group
        self._runner = ModelRunner(
            loaded,
            PoolSettings(
                block_size=settings.block_size,
                limits=Limits(
                    settings.max_num_seqs, settings.max_num_batched_tokens, loaded.context_length
                ),
                units=settings.pool_units,
                memory_bytes=settings.pool_memory,
                tiers=settings.tiers,
                records_steps=settings.graphs == "auto",
                gpu_memory_share=settings.gpu_memory_share,
                code_dtype=_CODE_DTYPES[settings.kv8_format],
            ),
            settings.kernels,
            group,
        )
        self._eos = tuple(loaded.eos_token_ids)
        self._context_length = loaded.context_length
        self._max_num_seqs = settings.max_num_seqs
        self._max_num_batched_tokens = settings.max_num_batched_tokens
        self._sampler = Sampler(self._runner.kernels, settings.max_num_seqs, self._eos, group.agree)
        is_padded = settings.graphs == "eager" or (
            settings.graphs == "auto" and self._runner.device.type == "cuda"
        )
        self._tables = BlockTables(
            self._max_num_seqs,
            self._runner.shard.num_blocks(self._context_length),
            self._runner.units_per_block,
            self._runner.device if is_padded else None,
        )
        self._graphs = self._record_graphs(settings) if is_padded else None
        self._sequences: dict[int, Sequence] = {}
        self.allocator = UnitAllocator(self._runner.pool.num_units)
        self._info = self._describe(UNCALIBRATED)

    def measure(self, through: Runner) -> None:
        """Time steps and advertise what they cost; takes a couple of seconds.

        ``through``: this engine, or what runs a plan on it and on the other ranks.
        """
        self._info = self._describe(calibrate(through, self._shape()))

    def _record_graphs(self, settings: WorkerSettings) -> DecodeGraphs | None:
        """Recorded decode steps; None, and a warning, where a model's cannot be recorded."""
        runner = self._runner
        graphs = DecodeGraphs(
            runner.forward,
            self._tables,
            runner.shard,
            runner.device,
            self._max_num_seqs,
            without_recording if settings.graphs == "eager" else CudaRecorder(),
        )
        try:
            graphs.record_all()
            is_recorded = True
        except RuntimeError as error:
            if settings.graphs == "eager":
                raise
            log.warning("graphs.unavailable", reason=str(error).partition("\n")[0])
            is_recorded = False
        # Ranks that run different kernels for a step would wait for each other in the wrong places.
        return graphs if self._group.least(int(is_recorded), runner.device) else None

    @property
    def info(self) -> EngineInfo:
        """What to register."""
        return self._info

    def execute(self, plan: BatchPlan) -> StepOutput:
        """Run one iteration. Raises :class:`PlanError` when the plan disagrees with the state."""
        self.release(plan.release)
        for sequence_id in plan.promote:
            self._promote(sequence_id)
        for new in plan.new:
            self._add(new)
        parts, skipped = self._parts(plan.scheduled)
        if not parts:
            return StepOutput((), skipped, (), self.allocator.num_free)
        logits, sampled = self._forward(parts)
        for part in parts:
            part.sequence.num_computed += part.num_new
        sequences = [part.sequence for part in sampled]
        chosen = self._sampler.sample(logits, sequences)
        outputs, failures = self._append(sequences, chosen, [p.sequence for p in parts])
        return StepOutput(outputs, skipped, failures, self.allocator.num_free)

    def _forward(self, parts: Seq[Part]) -> tuple[Tensor, Seq[Part]]:
        """Logits ``[len(sampled), vocab_size]`` and the parts that they are of."""
        recorded = None if self._graphs is None else self._graphs.run(parts)
        if recorded is not None:
            return recorded
        step = build_step(parts, self._tables, self._runner.shard, self._runner.device)
        logits = self._runner.forward(
            step.token_ids, step.positions, step.attention, step.logit_rows
        )
        return logits, step.sampled

    def release(self, sequence_ids: Seq[int]) -> None:
        """Forget sequences and free their units; unknown ids are ignored."""
        for sequence_id in sequence_ids:
            sequence = self._sequences.pop(sequence_id, None)
            if sequence is not None:
                self.allocator.free(
                    self._tables.units(sequence.tier, sequence.row, sequence.num_blocks)
                )
                self._tables.give_row(sequence.row)
                self._sampler.forget(sequence.row)

    def reset(self) -> None:
        """Forget every sequence."""
        self.release(list(self._sequences))
        self.allocator.check_integrity()

    def _add(self, new: NewSequence) -> None:
        if new.sequence_id in self._sequences:
            raise PlanError(f"sequence {new.sequence_id} is new but known")
        if new.tier not in self._runner.units_per_block:
            raise PlanError(f"sequence {new.sequence_id} is in {new.tier.name}, not offered here")
        row = self._tables.take_row()
        if row is None:
            raise PlanError(f"more than {self._max_num_seqs} sequences")
        self._sequences[new.sequence_id] = Sequence.of(new, row)

    def _parts(self, scheduled: Seq[ScheduledSequence]) -> tuple[list[Part], list[int]]:
        """What to run, with units for it, and the sequences that have ended already."""
        parts: list[Part] = []
        skipped: list[int] = []
        for entry in scheduled:
            sequence = self._sequences.get(entry.sequence_id)
            if sequence is None:
                raise PlanError(f"sequence {entry.sequence_id} is scheduled but unknown")
            if sequence.has_ended:
                skipped.append(entry.sequence_id)
                continue
            end = entry.num_computed_tokens + entry.num_new_tokens
            if (
                entry.num_computed_tokens != sequence.num_computed
                or entry.num_new_tokens < 1
                or end > len(sequence.token_ids)
                or end > self._context_length
            ):
                raise PlanError(
                    f"sequence {entry.sequence_id}: plan computes [{entry.num_computed_tokens},"
                    f" {end}), {sequence.num_computed} of {len(sequence.token_ids)} are computed"
                )
            self._grow(sequence, end)
            parts.append(Part(sequence, entry.num_new_tokens))
        return parts, skipped

    def _grow(self, sequence: Sequence, num_tokens: int) -> None:
        missing = self._runner.shard.num_blocks(num_tokens) - sequence.num_blocks
        if missing <= 0:
            return
        units = self._allocate(missing * self._runner.units_per_block[sequence.tier])
        sequence.num_blocks = self._tables.extend(
            sequence.tier, sequence.row, sequence.num_blocks, units
        )

    def _allocate(self, count: int) -> list[int]:
        units = self.allocator.allocate(count)
        if units is None:
            raise PlanError(f"the plan needs {count} units, {self.allocator.num_free} are free")
        return units

    def _promote(self, sequence_id: int) -> None:
        """Hidden → KV: the sequence keeps its units and gets the difference."""
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            raise PlanError(f"sequence {sequence_id} is promoted but unknown")
        if sequence.has_ended:
            return
        if sequence.tier is not Tier.HIDDEN or Tier.KV not in self._runner.units_per_block:
            raise PlanError(f"sequence {sequence_id} cannot be promoted to KV")
        row, blocks = sequence.row, sequence.num_blocks
        hidden_table = self._tables.table(Tier.HIDDEN, row, blocks)
        held = self._tables.units(Tier.HIDDEN, row, blocks)
        wanted = blocks * self._runner.units_per_block[Tier.KV]
        units = held + self._allocate(wanted - len(held))
        self._tables.extend(Tier.KV, row, 0, units)
        self._runner.promote(
            hidden_table, self._tables.table(Tier.KV, row, blocks), sequence.num_computed
        )
        sequence.tier = Tier.KV

    def _append(
        self, sampled: Seq[Sequence], chosen: Seq[Sampled | None], order: Seq[Sequence]
    ) -> tuple[list[SequenceOutput], list[tuple[int, str]]]:
        """Add the chosen tokens to their sequences; outputs in plan order."""
        outputs: dict[int, SequenceOutput] = {}
        failures: list[tuple[int, str]] = []
        for sequence, token in zip(sampled, chosen, strict=True):
            if token is None:
                sequence.has_ended = True
                failures.append((sequence.sequence_id, "the model produced no finite logits"))
                continue
            sequence.token_ids.append(token.token_id)
            reason = self._finish_reason(sequence, token.token_id)
            sequence.has_ended = reason is not None
            outputs[sequence.sequence_id] = SequenceOutput(
                sequence.sequence_id,
                (token.token_id,),
                reason,
                () if token.logprobs is None else (token.logprobs,),
            )
        in_order = [outputs[s.sequence_id] for s in order if s.sequence_id in outputs]
        return in_order, failures

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        s = sequence.sampling
        if token_id in s.stop_token_ids or (token_id in self._eos and not s.ignore_eos):
            return FinishReason.STOP
        is_full = len(sequence.token_ids) > self._context_length
        if is_full or sequence.num_output_tokens >= s.max_tokens:
            return FinishReason.LENGTH
        return None

    def _shape(self) -> Shape:
        return Shape(
            tiers=tuple(self._runner.units_per_block),
            units_per_block=dict(self._runner.units_per_block),
            num_units=self._runner.pool.num_units,
            block_size=self._runner.shard.block_size,
            context_length=self._context_length,
            max_num_seqs=self._max_num_seqs,
            max_num_batched_tokens=self._max_num_batched_tokens,
        )

    def _describe(self, measured: Measured) -> EngineInfo:
        runner, loaded = self._runner, self._loaded
        tiers = [
            TierInfo(
                tier,
                units,
                measured.seconds_per_cached_token.get(tier, 0.0),
                exact=tier is not Tier.KV8,
            )
            for tier, units in runner.units_per_block.items()
        ]
        return EngineInfo(
            model_name=loaded.name,
            fingerprint=loaded.fingerprint,
            architecture=loaded.architecture,
            context_length=loaded.context_length,
            vocab_size=loaded.vocab_size,
            eos_token_ids=self._eos,
            tokenizer_json=loaded.tokenizer_json,
            num_units=runner.pool.num_units,
            block_size=runner.shard.block_size,
            unit_bytes=runner.unit_bytes * self._group.size,
            tiers=tiers,
            calibration=measured.coefficients,
            max_num_seqs=self._max_num_seqs,
            max_num_batched_tokens=self._max_num_batched_tokens,
            device=device_name(runner.device, self._group.size),
        )


def device_name(device: torch.device, count: int = 1) -> str:
    """A device, or several of it, by the name people know it by."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name if count == 1 else f"{count} x {name}"


def choose_device(name: str, rank: int = 0) -> torch.device:
    """``auto`` is the first GPU if there is one; of several ranks each takes its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda", rank) if name == "cuda" else torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is float32 on a CPU, whose products are fastest in it, and bfloat16 elsewhere."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def load_engine(settings: WorkerSettings, group: RankGroup = ALONE) -> ModelEngine:
    """Load the model of ``settings``, or a rank's part of it, and make it ready to run plans."""
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    device = choose_device(settings.device, group.rank)
    loaded = load_model(
        settings.model,
        name=settings.model_name,
        device=device,
        dtype=choose_dtype(settings.dtype, device),
        group=group,
    )
    return ModelEngine(loaded, settings, group)


def build_engine(settings: WorkerSettings) -> ModelEngine:
    """An engine of one process that has measured what its steps cost, if it is to."""
    engine = load_engine(settings)
    if settings.calibrate:
        engine.measure(engine)
    return engine
