"""The engine: a plan in, tokens out."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass
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
    MAX_LAUNCHED,
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
from aptserve_worker.sampling import Choice, Sampled, Sampler
from aptserve_worker.sequences import Sequence
from aptserve_worker.transfer import to_device

if TYPE_CHECKING:  # who brings settings of its own needs not what reads them from the environment
    from aptserve_worker.config import WorkerSettings

log = structlog.get_logger(__name__)

_CODE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(slots=True)
class LaunchedStep:
    """A step under way, and what is needed to enter its tokens; see :class:`ModelEngine`."""

    scheduled: Seq[Sequence]
    """In plan order, those that had ended before included."""
    sampled: Seq[tuple[Sequence, int]]
    """Those that get a token, in the order of ``choice``, each with the units that it held when the
    step was launched."""
    choice: Choice
    num_free_units: int
    """Units free after the step."""

    def wait(self) -> None:
        """See :class:`aptserve_worker.plan.Launched`."""
        self.choice.wait()


class ModelEngine:
    """Runs plans on one model; implements :class:`aptserve_worker.plan.Engine`.

    Launching never waits for the device. It does its work in the order given, so memory that a
    launched step uses may be given to a sequence of the next one at once; and it keeps the last
    token of each sequence, so the next step needs none from the host.
    """

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
        self._sampler = Sampler(
            self._runner.kernels,
            settings.max_num_seqs,
            self._eos,
            self._runner.device,
            group.agree,
        )
        self._overlaps = settings.overlap == "on" or (
            settings.overlap == "auto" and self._runner.device.type == "cuda"
        )
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
        self._launched: deque[LaunchedStep] = deque()
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
            self._sampler.last_tokens,
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

    @property
    def overlaps(self) -> bool:
        """Whether to launch a plan while the one before runs.

        By itself only on a GPU: a CPU has done the work when it is launched.
        """
        return self._overlaps

    def execute(self, plan: BatchPlan) -> StepOutput:
        """Run one iteration by itself. Raises :class:`PlanError`."""
        self.launch(plan)
        return self.collect()

    def launch(self, plan: BatchPlan) -> LaunchedStep:
        """Begin one iteration. Raises :class:`PlanError` when the plan disagrees with the state."""
        if len(self._launched) == MAX_LAUNCHED:
            raise RuntimeError(f"{MAX_LAUNCHED} steps are launched and not collected")
        self.release(plan.release)
        for sequence_id in plan.promote:
            self._promote(sequence_id)
        for new in plan.new:
            self._add(new)
        scheduled = [self._known(entry.sequence_id) for entry in plan.scheduled]
        parts = [
            self._part(sequence, entry)
            for sequence, entry in zip(scheduled, plan.scheduled, strict=True)
            if not sequence.is_over
        ]
        logits, sampled = self._forward(parts)
        choice = self._sampler.sample(logits, [part.sequence for part in sampled])
        for part in parts:
            part.sequence.num_computed += part.num_new
        for part in sampled:
            part.sequence.num_pending += 1
        step = LaunchedStep(
            scheduled,
            [(part.sequence, len(part.sequence.units)) for part in sampled],
            choice,
            self.allocator.num_free,
        )
        self._launched.append(step)
        return step

    def collect(self) -> StepOutput:
        """Wait for the oldest launched iteration and enter its tokens."""
        step = self._launched[0]
        chosen = step.choice.read()
        self._launched.popleft()
        # These ended with a step before, maybe after this one was launched.
        skipped = [s.sequence_id for s in step.scheduled if s.has_ended]
        outputs: dict[int, SequenceOutput] = {}
        failures: list[tuple[int, str]] = []
        for (sequence, num_units), token in zip(step.sampled, chosen, strict=True):
            sequence.num_pending -= 1
            if sequence.has_ended:
                continue
            if token is None:
                self._end(sequence, num_units)
                failures.append((sequence.sequence_id, "the model produced no finite logits"))
                continue
            outputs[sequence.sequence_id] = output = self._append(sequence, token)
            if output.finish_reason is not None:
                self._end(sequence, num_units)
        in_order = [outputs[s.sequence_id] for s in step.scheduled if s.sequence_id in outputs]
        return StepOutput(in_order, skipped, failures, step.num_free_units)

    def _forward(self, parts: Seq[Part]) -> tuple[Tensor, Seq[Part]]:
        """Logits ``[len(sampled), vocab_size]`` and the parts that they are of."""
        runner = self._runner
        if not parts:
            return torch.empty(0, 0, device=runner.device), ()
        recorded = None if self._graphs is None else self._graphs.run(parts)
        if recorded is not None:
            return recorded
        step = build_step(
            parts, self._tables, runner.shard, runner.device, self._sampler.last_tokens
        )
        logits = runner.forward(step.token_ids, step.positions, step.attention, step.logit_rows)
        return logits, step.sampled

    def release(self, sequence_ids: Seq[int]) -> None:
        """Forget sequences and free their units; unknown ids are ignored."""
        for sequence_id in sequence_ids:
            sequence = self._sequences.pop(sequence_id, None)
            if sequence is not None:
                self.allocator.free(sequence.units)
                self._tables.give_row(sequence.row)
                self._sampler.forget(sequence.row)

    def reset(self) -> None:
        """Forget every sequence and every launched iteration."""
        self._launched.clear()
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
        self._sequences[new.sequence_id] = Sequence.of(new, row, self._context_length)

    def _known(self, sequence_id: int, what: str = "scheduled") -> Sequence:
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            raise PlanError(f"sequence {sequence_id} is {what} but unknown")
        return sequence

    def _part(self, sequence: Sequence, entry: ScheduledSequence) -> Part:
        """What to run of a sequence, with units for it."""
        end = entry.num_computed_tokens + entry.num_new_tokens
        if (
            entry.num_computed_tokens != sequence.num_computed
            or entry.num_new_tokens < 1
            or end > sequence.num_tokens
            or end > self._context_length
        ):
            raise PlanError(
                f"sequence {entry.sequence_id}: plan computes [{entry.num_computed_tokens},"
                f" {end}), {sequence.num_computed} of {sequence.num_tokens} are computed"
            )
        self._grow(sequence, end)
        return Part(sequence, entry.num_new_tokens)

    def _grow(self, sequence: Sequence, num_tokens: int) -> None:
        per_block = self._runner.units_per_block[sequence.tier]
        num_blocks = len(sequence.units) // per_block
        missing = self._runner.shard.num_blocks(num_tokens) - num_blocks
        if missing <= 0:
            return
        units = self._allocate(missing * per_block)
        self._tables.extend(sequence.tier, sequence.row, num_blocks, units)
        sequence.units += units

    def _allocate(self, count: int) -> list[int]:
        units = self.allocator.allocate(count)
        if units is None:
            raise PlanError(f"the plan needs {count} units, {self.allocator.num_free} are free")
        return units

    def _promote(self, sequence_id: int) -> None:
        """Hidden → KV: the sequence keeps its units and gets the difference."""
        sequence = self._known(sequence_id, "promoted")
        if sequence.is_over:
            return
        if sequence.tier is not Tier.HIDDEN or Tier.KV not in self._runner.units_per_block:
            raise PlanError(f"sequence {sequence_id} cannot be promoted to KV")
        row, device = sequence.row, self._runner.device
        num_blocks = len(sequence.units) // self._runner.units_per_block[Tier.HIDDEN]
        wanted = num_blocks * self._runner.units_per_block[Tier.KV]
        sequence.units += self._allocate(wanted - len(sequence.units))
        self._tables.extend(Tier.KV, row, 0, sequence.units)
        self._runner.promote(
            to_device(self._tables.table(Tier.HIDDEN, row, num_blocks), device),
            to_device(self._tables.table(Tier.KV, row, num_blocks), device),
            sequence.num_computed,
        )
        sequence.tier = Tier.KV

    def _append(self, sequence: Sequence, token: Sampled) -> SequenceOutput:
        """Enter the token that was chosen for a sequence."""
        sequence.token_ids.append(token.token_id)
        return SequenceOutput(
            sequence.sequence_id,
            (token.token_id,),
            self._finish_reason(sequence, token.token_id),
            () if token.logprobs is None else (token.logprobs,),
        )

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        s = sequence.sampling
        if token_id in s.stop_token_ids or (token_id in self._eos and not s.ignore_eos):
            return FinishReason.STOP
        if len(sequence.token_ids) >= sequence.max_num_tokens:
            return FinishReason.LENGTH
        return None

    def _end(self, sequence: Sequence, num_units: int) -> None:
        """Run nothing more of a sequence, which holds ``num_units`` until it is released.

        What the step launched meanwhile has taken for it goes back; the device does with these
        units what that step says before it does anything for their next owner.
        """
        sequence.has_ended = True
        taken = sequence.units[num_units:]
        for later in self._launched:
            later.num_free_units += len(taken)
        if self._sequences.get(sequence.sequence_id) is sequence:
            self.allocator.free(taken)
            del sequence.units[num_units:]

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
    """Load the model of ``settings``, or a rank's part of it, and make it ready to run plans.

    A GPU that it takes becomes the current one of the calling thread, which is to run the plans.
    """
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    device = choose_device(settings.device, group.rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where Triton launches, and torch makes streams and events
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
