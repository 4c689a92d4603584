"""An engine without a model, which is strict about plans."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from aptserve_worker.fake.faults import FaultKind, FaultPlan
from aptserve_worker.fake.model import FakeModel
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
)

GATE_TIMEOUT_SECONDS = 60.0


class StepGate:
    """Lets a test decide when steps run; open until :meth:`hold`. Safe from any thread."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._num_allowed: int | None = None
        self._num_waiting = 0

    def hold(self) -> None:
        """Let no further step begin."""
        with self._condition:
            self._num_allowed = 0

    def allow(self, num_steps: int = 1) -> None:
        """Let so many more steps run, then hold."""
        with self._condition:
            self._num_allowed = (self._num_allowed or 0) + num_steps
            self._condition.notify_all()

    def open(self) -> None:
        """Let everything run."""
        with self._condition:
            self._num_allowed = None
            self._condition.notify_all()

    @property
    def is_waiting(self) -> bool:
        """Whether a step stands at the closed gate."""
        with self._condition:
            return self._num_waiting > 0

    def wait(self) -> None:
        """Called by the engine before a step; ``TimeoutError`` for a gate forgotten closed."""
        with self._condition:
            self._num_waiting += 1
            try:
                if not self._condition.wait_for(
                    lambda: self._num_allowed != 0, GATE_TIMEOUT_SECONDS
                ):
                    raise TimeoutError("the step gate stayed closed")
            finally:
                self._num_waiting -= 1
            if self._num_allowed is not None:
                self._num_allowed -= 1


@dataclass(slots=True)
class _Sequence:
    """A sequence the engine knows, ended or not; it holds its units until it is released."""

    new: NewSequence
    tier: Tier
    num_tokens: int
    state: int
    num_computed_tokens: int = 0
    num_units: int = 0
    finish_reason: FinishReason | None = None
    failed: bool = False

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.new.num_prompt_tokens

    @property
    def ended(self) -> bool:
        return self.failed or self.finish_reason is not None


class _Done:
    """A step that was done when it was launched."""

    def wait(self) -> None:
        return


@dataclass
class FakeEngine:
    """Runs plans on counts alone; raises :class:`PlanError` for every plan that could not be run.

    A plan runs when it is launched; collecting only hands its output over.

    A sequence of n cached tokens in tier t holds ``ceil(n / block_size) * units_per_block(t)``
    units until it is released, also after its end. ``step_seconds`` is slept in each step.
    """

    model: FakeModel = field(default_factory=FakeModel)
    step_seconds: float = 0.0
    faults: FaultPlan = field(default_factory=lambda: FaultPlan(()))
    gate: StepGate = field(default_factory=StepGate)
    overlaps: bool = False

    def __post_init__(self) -> None:
        self._sequences: dict[int, _Sequence] = {}
        self._outputs: deque[StepOutput] = deque()
        self._units_per_block = {t.tier: t.units_per_block for t in self.model.tiers}
        self._num_free_units = self.model.num_units
        self.num_steps = 0
        """Plans begun since construction, failed ones included."""
        self.num_resets = 0

    @property
    def info(self) -> EngineInfo:
        """What to register."""
        return self.model.info()

    @property
    def num_sequences(self) -> int:
        """Sequences not released yet."""
        return len(self._sequences)

    @property
    def num_free_units(self) -> int:
        """Units that no sequence holds."""
        return self._num_free_units

    def execute(self, plan: BatchPlan) -> StepOutput:
        """One iteration by itself."""
        self.launch(plan)
        return self.collect()

    def launch(self, plan: BatchPlan) -> _Done:
        """Run one iteration; see :class:`aptserve_worker.plan.Engine`."""
        if len(self._outputs) == MAX_LAUNCHED:
            raise RuntimeError(f"{MAX_LAUNCHED} steps are launched and not collected")
        self.gate.wait()
        if self.step_seconds:
            time.sleep(self.step_seconds)
        self.num_steps += 1
        fault = self.faults.before_step(self.num_steps)
        self.release(plan.release)
        for sequence_id in plan.promote:
            self._promote(sequence_id)
        for new in plan.new:
            self._add(new)
        self._outputs.append(self._run(plan.scheduled, fault))
        return _Done()

    def collect(self) -> StepOutput:
        """The output of the oldest launched iteration."""
        return self._outputs.popleft()

    def release(self, sequence_ids: Sequence[int]) -> None:
        """Forget sequences; unknown ids are ignored."""
        for sequence_id in sequence_ids:
            sequence = self._sequences.pop(sequence_id, None)
            if sequence is not None:
                self._num_free_units += sequence.num_units

    def reset(self) -> None:
        """Forget every sequence."""
        self._sequences.clear()
        self._outputs.clear()
        self._num_free_units = self.model.num_units
        self.num_resets += 1

    def check_integrity(self) -> None:
        """Recount the units and name the numbers that disagree."""
        held = sum(sequence.num_units for sequence in self._sequences.values())
        if held + self._num_free_units != self.model.num_units:
            raise AssertionError(
                f"{held} held + {self._num_free_units} free != {self.model.num_units} units"
            )

    def _promote(self, sequence_id: int) -> None:
        sequence = self._known(sequence_id)
        if sequence.tier is not Tier.HIDDEN:
            raise PlanError(f"sequence {sequence_id} to promote is in tier {sequence.tier.name}")
        sequence.tier = Tier.KV
        self._hold(sequence, sequence.num_computed_tokens)

    def _add(self, new: NewSequence) -> None:
        if new.sequence_id in self._sequences:
            raise PlanError(f"sequence {new.sequence_id} is known already")
        if new.tier not in self._units_per_block:
            raise PlanError(f"sequence {new.sequence_id}: no tier {new.tier.name} here")
        if not 1 <= new.num_prompt_tokens <= len(new.token_ids) <= self.model.context_length:
            raise PlanError(
                f"sequence {new.sequence_id}: {new.num_prompt_tokens} prompt tokens of "
                f"{len(new.token_ids)}, context {self.model.context_length}"
            )
        if not all(0 <= t < self.model.vocab_size for t in new.token_ids):
            raise PlanError(f"sequence {new.sequence_id}: a token is outside the vocabulary")
        state = self.model.hash_tokens(new.token_ids)
        self._sequences[new.sequence_id] = _Sequence(new, new.tier, len(new.token_ids), state)

    def _run(self, scheduled: Sequence[ScheduledSequence], fault: FaultKind | None) -> StepOutput:
        self._check_limits(scheduled)
        outputs: list[SequenceOutput] = []
        skipped: list[int] = []
        failures: list[tuple[int, str]] = []
        for part in scheduled:
            sequence = self._known(part.sequence_id)
            if sequence.ended:
                skipped.append(part.sequence_id)
                continue
            self._compute(sequence, part)
            if fault is FaultKind.NAN and not failures:
                sequence.failed = True
                failures.append((part.sequence_id, "logits are not finite"))
            elif sequence.num_computed_tokens == sequence.num_tokens:
                outputs.append(self._sample(sequence))
        return StepOutput(outputs, skipped, failures, self._num_free_units)

    def _check_limits(self, scheduled: Sequence[ScheduledSequence]) -> None:
        num_new_tokens = sum(part.num_new_tokens for part in scheduled)
        if len(scheduled) > self.model.max_num_seqs:
            raise PlanError(f"{len(scheduled)} sequences, at most {self.model.max_num_seqs}")
        if num_new_tokens > self.model.max_num_batched_tokens:
            raise PlanError(
                f"{num_new_tokens} new tokens, at most {self.model.max_num_batched_tokens}"
            )
        if len({part.sequence_id for part in scheduled}) < len(scheduled):
            raise PlanError("a sequence is scheduled twice")

    def _compute(self, sequence: _Sequence, part: ScheduledSequence) -> None:
        """Cache tokens ``[num_computed_tokens, +num_new_tokens)``."""
        if part.num_computed_tokens != sequence.num_computed_tokens:
            raise PlanError(
                f"sequence {part.sequence_id} has {sequence.num_computed_tokens} computed tokens, "
                f"the plan says {part.num_computed_tokens}"
            )
        end = part.num_computed_tokens + part.num_new_tokens
        if part.num_new_tokens < 1 or end > sequence.num_tokens:
            raise PlanError(
                f"sequence {part.sequence_id}: tokens [{part.num_computed_tokens}, {end}) of "
                f"{sequence.num_tokens}"
            )
        self._hold(sequence, end)
        sequence.num_computed_tokens = end

    def _hold(self, sequence: _Sequence, num_tokens: int) -> None:
        """Make the sequence hold exactly the units of so many cached tokens in its tier."""
        num_blocks = -(-num_tokens // self.model.block_size)
        num_units = num_blocks * self._units_per_block[sequence.tier]
        num_more = num_units - sequence.num_units
        if num_more > self._num_free_units:
            raise PlanError(
                f"sequence {sequence.new.sequence_id} needs {num_more} more units, "
                f"{self._num_free_units} are free"
            )
        self._num_free_units -= num_more
        sequence.num_units = num_units

    def _sample(self, sequence: _Sequence) -> SequenceOutput:
        sampling = sequence.new.sampling
        token_id = self.model.choose(sequence.state, sequence.num_output_tokens + 1, sampling)
        sequence.state = self.model.hash_tokens((token_id,), sequence.state)
        sequence.num_tokens += 1
        sequence.finish_reason = self.model.finish_reason(
            token_id, sequence.num_tokens, sequence.num_output_tokens, sampling
        )
        return SequenceOutput(
            sequence_id=sequence.new.sequence_id,
            token_ids=(token_id,),
            finish_reason=sequence.finish_reason,
            logprobs=self.model.logprobs(token_id, sampling),
        )

    def _known(self, sequence_id: int) -> _Sequence:
        try:
            return self._sequences[sequence_id]
        except KeyError:
            raise PlanError(f"sequence {sequence_id} is not known") from None
