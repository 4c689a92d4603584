"""Faults that a fake worker can be told to have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from aptserve.v1 import worker_pb2

from aptserve_worker.attachment import StreamLostError, encode_reply
from aptserve_worker.device_thread import Step
from aptserve_worker.plan import PlanError


class FaultKind(Enum):
    """What goes wrong."""

    ERROR = "error"
    """The engine raises."""
    OUT_OF_MEMORY = "out_of_memory"
    """The engine raises ``MemoryError``."""
    PLAN_ERROR = "plan_error"
    """The engine refuses the plan."""
    NAN = "nan"
    """The logits of the first sequence are no numbers: it fails, the others go on."""
    WRONG_PLAN_ID = "wrong_plan_id"
    """The reply names another plan."""
    DUPLICATE_REPLY = "duplicate_reply"
    """The reply is sent twice."""
    DROP_STREAM = "drop_stream"
    """The stream breaks in place of the reply; the worker dials again."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault, at the n-th step of the worker's life, counted from 1."""

    step: int
    kind: FaultKind


class FaultPlan:
    """Which fault is due; engine faults by executed plans, wire faults by replies."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._kinds = {fault.step: fault.kind for fault in faults}
        self._num_replies = 0

    def before_step(self, step: int) -> FaultKind | None:
        """The fault of a step, after raising it where it is one that raises."""
        kind = self._kinds.get(step)
        if kind is FaultKind.ERROR:
            raise RuntimeError(f"injected failure of step {step}")
        if kind is FaultKind.OUT_OF_MEMORY:
            raise MemoryError(f"injected lack of memory in step {step}")
        if kind is FaultKind.PLAN_ERROR:
            raise PlanError(f"injected refusal of step {step}")
        return kind

    def encode(self, step: Step) -> Iterable[worker_pb2.AttachRequest]:
        """The messages that answer a step, spoiled where a wire fault is due."""
        self._num_replies += 1
        kind = self._kinds.get(self._num_replies)
        messages = list(encode_reply(step))
        if kind is FaultKind.DROP_STREAM:
            raise StreamLostError(f"injected loss of the stream at reply {self._num_replies}")
        if kind is FaultKind.WRONG_PLAN_ID:
            messages[0].step_result.plan_id += 1_000_000
        if kind is FaultKind.DUPLICATE_REPLY:
            messages *= 2
        return messages
