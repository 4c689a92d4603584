"""An engine over several ranks: this process is the first of them."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import structlog

from aptserve_worker.config import WorkerSettings
from aptserve_worker.exit_codes import EXIT_BROKEN
from aptserve_worker.parallel.processes import Followers
from aptserve_worker.plan import BatchPlan, EngineInfo, Launched, PlanError, StepOutput

log = structlog.get_logger(__name__)


def leave(reason: str) -> None:
    """End the process: a rank that waits for a lost one inside an operation cannot be woken."""
    log.error("ranks.lost", reason=reason)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_BROKEN)


class ParallelEngine:
    """Runs every plan on all ranks; implements :class:`aptserve_worker.plan.Engine`.

    All ranks do the same: the same plan finds them in the same state, so that a wrong plan is
    refused by each of them before any waits for another. What a rank meets alone, such as a lack of
    memory, ends all of them.
    """

    def __init__(self, settings: WorkerSettings, on_lost: Callable[[str], None] = leave) -> None:
        """Start the other ranks, load, measure. Raises :class:`UnsupportedModelError`."""
        self._on_lost = on_lost
        with tempfile.TemporaryDirectory(prefix="aptserve-") as folder:
            meeting_point = Path(folder) / "ranks"
            self._followers = Followers(settings, meeting_point, on_lost)
            # Not before: importing torch takes seconds, which all ranks may spend at the same time.
            from aptserve_worker.engine import load_engine
            from aptserve_worker.parallel.ranks import join_group

            try:
                self._engine = load_engine(settings, join_group(settings, 0, meeting_point))
                if settings.calibrate:
                    self._engine.measure(self)
            except BaseException:
                self.close()
                raise

    @property
    def info(self) -> EngineInfo:
        """What to register."""
        return self._engine.info

    @property
    def overlaps(self) -> bool:
        """Whether to launch a plan while the one before runs."""
        return self._engine.overlaps

    def execute(self, plan: BatchPlan) -> StepOutput:
        """Run one iteration by itself. Raises :class:`PlanError`."""
        self.launch(plan)
        return self.collect()

    def launch(self, plan: BatchPlan) -> Launched:
        """Begin one iteration on all ranks. Raises :class:`PlanError` for a wrong plan."""
        self._followers.tell("launch", plan)
        with self._together():
            return self._engine.launch(plan)

    def collect(self) -> StepOutput:
        """Wait for the oldest launched iteration and return its tokens."""
        self._followers.tell("collect")
        with self._together():
            return self._engine.collect()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What breaks here and nowhere else leaves the others waiting for this rank."""
        try:
            yield
        except PlanError:
            raise
        except Exception as error:
            log.exception("rank.failed", rank=0)
            self._on_lost(f"rank 0 failed: {error}")
            raise

    def release(self, sequence_ids: Sequence[int]) -> None:
        """Forget sequences and free their units; unknown ids are ignored."""
        self._followers.tell("release", sequence_ids)
        self._engine.release(sequence_ids)

    def reset(self) -> None:
        """Forget every sequence."""
        self._followers.tell("reset")
        self._engine.reset()

    def close(self) -> None:
        """End the other ranks; the engine is of no use afterwards."""
        from aptserve_worker.parallel.ranks import leave_group

        self._followers.close()
        leave_group()
