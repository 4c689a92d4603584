"""Drives an engine as a scheduler would, without one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aptserve_worker.config import WorkerSettings
from aptserve_worker.engine import ModelEngine, build_engine
from aptserve_worker.plan import (
    BatchPlan,
    Engine,
    FinishReason,
    NewSequence,
    Sampling,
    ScheduledSequence,
    SequenceOutput,
    Tier,
)

_IDS = itertools.count(1)


def engine_settings(model: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "calibrate": False,
        "block_size": 4,
        "pool_units": 1500,
        "max_num_seqs": 40,
        "num_threads": 1,
        **changes,
    }


def make_engine(model: Path, **changes: Any) -> ModelEngine:
    return build_engine(WorkerSettings(**engine_settings(model, **changes)))


class Driver:
    """Keeps the scheduler's side of the bookkeeping for some sequences."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: dict[int, list[int]] = {}
        self.prompts: dict[int, int] = {}
        self.computed: dict[int, int] = {}
        self.finished: dict[int, FinishReason] = {}
        self.logprobs: dict[int, list[Any]] = {}
        self._plan_id = 0
        self._new: list[NewSequence] = []

    def add(
        self,
        prompt: Sequence[int],
        *,
        tier: Tier = Tier.KV,
        num_prompt_tokens: int | None = None,
        **sampling: Any,
    ) -> int:
        sequence_id = next(_IDS)
        values: dict[str, Any] = {"max_tokens": 16, "seed": 0, **sampling}
        count = len(prompt) if num_prompt_tokens is None else num_prompt_tokens
        self._new.append(
            NewSequence(sequence_id, "r", list(prompt), count, tier, Sampling(**values))
        )
        self.tokens[sequence_id] = list(prompt)
        self.prompts[sequence_id] = count
        self.computed[sequence_id] = 0
        self.logprobs[sequence_id] = []
        return sequence_id

    def step(
        self,
        parts: dict[int, int] | None = None,
        *,
        release: Sequence[int] = (),
        promote: Sequence[int] = (),
    ) -> list[SequenceOutput]:
        """Run ``parts`` (sequence → new tokens); None: all that is left of every live one."""
        if parts is None:
            parts = {
                s: len(t) - self.computed[s]
                for s, t in self.tokens.items()
                if s not in self.finished and s not in release
            }
        self._plan_id += 1
        plan = BatchPlan(
            self._plan_id,
            release=release,
            promote=promote,
            new=tuple(self._new),
            scheduled=[ScheduledSequence(s, self.computed[s], n) for s, n in parts.items()],
        )
        self._new = []
        result = self.engine.execute(plan)
        assert not result.failures
        for s, n in parts.items():
            self.computed[s] += n
        for output in result.outputs:
            self.tokens[output.sequence_id] += output.token_ids
            self.logprobs[output.sequence_id] += output.logprobs
            if output.finish_reason is not None:
                self.finished[output.sequence_id] = output.finish_reason
        return list(result.outputs)

    def run(self, limit: int = 200) -> None:
        """Step until every sequence has ended."""
        for _ in range(limit):
            if all(s in self.finished for s in self.tokens):
                return
            self.step()
        raise AssertionError(f"not finished after {limit} steps")

    def output(self, sequence_id: int) -> list[int]:
        return self.tokens[sequence_id][self.prompts[sequence_id] :]
