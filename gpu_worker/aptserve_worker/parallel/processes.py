"""The processes of the ranks beside the first: started, told what to do, watched.

The first rank is the worker: it alone speaks to the scheduler, and passes every plan on. The others
are its children. One that ends takes the worker down with it, since a model without a part of its
weights serves nobody and a peer that waits inside a collective operation cannot be woken; a worker
that ends takes its children with it, however it ends.

Nothing here imports torch before a rank runs, so that all ranks do so at the same time.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import queue
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import structlog

from aptserve_worker.config import WorkerSettings
from aptserve_worker.exit_codes import EXIT_BROKEN, EXIT_OK
from aptserve_worker.logs import configure_logging
from aptserve_worker.plan import Engine, PlanError

log = structlog.get_logger(__name__)

_CLOSE_TIMEOUT_SECONDS = 5.0

Command = tuple[str, tuple[Any, ...]]
"""Name of an engine's method and its arguments."""


class Followers:
    """Ranks 1 to ``size - 1``, as the first one sees them."""

    def __init__(
        self, settings: WorkerSettings, meeting_point: Path, on_lost: Callable[[str], None]
    ) -> None:
        """Start them; ``on_lost`` is called, on a thread of its own, when one ends by itself."""
        context = mp.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._closing = threading.Event()
        self._on_lost = on_lost
        for rank in range(1, settings.tensor_parallel):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_follow,
                args=(rank, settings, meeting_point, theirs),
                name=f"aptserve-rank-{rank}",
                daemon=True,
            )
            process.start()
            theirs.close()  # or the pipe would outlive the process
            self._pipes.append(ours)
            self._processes.append(process)
        threading.Thread(target=self._watch, name="aptserve-ranks", daemon=True).start()

    def tell(self, name: str, *arguments: Any) -> None:
        """Have every rank call this method of its engine."""
        message = ForkingPickler.dumps((name, arguments))
        for pipe in self._pipes:
            pipe.send_bytes(message)

    def close(self) -> None:
        """End them; may be called twice."""
        self._closing.set()
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(_CLOSE_TIMEOUT_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()

    def _watch(self) -> None:
        ranks = {process.sentinel: rank for rank, process in enumerate(self._processes, 1)}
        rank = ranks[wait(list(ranks))[0]]  # type: ignore[index]
        process = self._processes[rank - 1]
        process.join()  # its pipe may end a moment before there is an exit code
        if not self._closing.is_set():
            self._on_lost(f"rank {rank} ended with exit code {process.exitcode}")


def _follow(rank: int, settings: WorkerSettings, meeting_point: Path, pipe: Connection) -> None:
    """Life of a rank: build its part of the model, do as the first one does."""
    # A signal is for the first rank, which may still have work for this one.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    configure_logging("error", settings.log_format)  # what all ranks find, the first says
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(pipe, commands), daemon=True)
    reader.start()
    from aptserve_worker.engine import load_engine
    from aptserve_worker.model.probe import UnsupportedModelError
    from aptserve_worker.parallel.ranks import join_group

    try:
        engine = load_engine(settings, join_group(settings, rank, meeting_point))
        while True:
            name, arguments = commands.get()
            _obey(engine, name, arguments)
    except UnsupportedModelError:
        reader.join()  # the first rank finds the same, says it and ends
    except Exception:
        log.exception("rank.failed", rank=rank)
        os._exit(EXIT_BROKEN)


def _read(pipe: Connection, commands: queue.SimpleQueue[Command]) -> None:
    """Take commands as they come; the end of the pipe is the end of the first rank."""
    try:
        while True:
            commands.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(EXIT_OK)


def _obey(engine: Engine, name: str, arguments: tuple[Any, ...]) -> None:
    with contextlib.suppress(PlanError):  # the first rank has found the same and answers for it
        getattr(engine, name)(*arguments)
