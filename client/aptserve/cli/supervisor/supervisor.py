"""Starts a scheduler and its workers together, keeps them up, and stops them in order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence

from aptserve.cli.supervisor.child import Child, ChildSpec
from aptserve.cli.supervisor.keeper import Keeper
from aptserve.cli.supervisor.parts import Part, State
from aptserve.cli.supervisor.probe import Probe, Snapshot

STOP_TIMEOUT_SECONDS = 10.0
"""From SIGTERM, its grace for requests aside, to SIGKILL; for the workers, then the scheduler."""
_PROBE_INTERVAL_SECONDS = 0.1


class StartTimeoutError(Exception):
    """The parts were not ready in time; the message names those missing."""


class StopRequest:
    """Ctrl-C, SIGTERM or a closed terminal: the first asks to stop, the second insists."""

    def __init__(self, on_insist: Callable[[], None]) -> None:
        self._requested = asyncio.Event()
        self._on_insist = on_insist
        self.insisted = False

    def listen(self) -> None:
        """Take over the signals; once, from inside the event loop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._receive)

    async def wait(self) -> None:
        """Return once a stop is requested."""
        await self._requested.wait()

    def _receive(self) -> None:
        if self._requested.is_set():
            self.insisted = True
            self._on_insist()
        self._requested.set()


class Supervisor:
    """One scheduler and its workers; a worker's child name is its worker id.

    ``on_change`` hears of every change of a part's state. Running requests may go on for
    ``grace_seconds`` when a stop is requested. Made inside the event loop.
    """

    def __init__(
        self,
        scheduler: ChildSpec,
        workers: Sequence[ChildSpec],
        probe: Probe,
        on_change: Callable[[Part], None],
        *,
        grace_seconds: float,
    ) -> None:
        self._changed = asyncio.Event()
        self._on_change = on_change
        self._probe = probe
        self._grace_seconds = grace_seconds
        self._scheduler = self._keeper(scheduler)
        self._workers = [self._keeper(spec) for spec in workers]
        self._first_ready: asyncio.Future[Snapshot] = asyncio.get_running_loop().create_future()
        self.stop_request = StopRequest(self._kill_all)

    @property
    def parts(self) -> list[Part]:
        """Scheduler first, then workers."""
        return [keeper.part for keeper in self._keepers]

    async def run(
        self, errand: Callable[[], Awaitable[None]], on_stopping: Callable[[], None]
    ) -> None:
        """Keep everything up until a stop is requested; no child is left when it returns.

        ``errand`` runs beside and may use :meth:`wait_ready`; its error ends the run.
        ``on_stopping`` is called when a stop was requested. Raises :class:`ChildGaveUpError` and
        what ``errand`` raises.
        """
        self.stop_request.listen()
        stop = asyncio.create_task(self.stop_request.wait())
        work: list[asyncio.Task[None]] = [
            *(asyncio.create_task(keeper.run()) for keeper in self._keepers),
            asyncio.create_task(self._watch()),
            asyncio.create_task(_run(errand)),
        ]
        try:
            await _first_end(stop, work)
            on_stopping()
        finally:
            for task in (stop, *work):
                task.cancel()
            await asyncio.gather(stop, *work, return_exceptions=True)
            await self._stop_children()

    async def wait_ready(self, timeout_seconds: float) -> Snapshot:
        """Return the scheduler's answer once every part is ready.

        Raises :class:`StartTimeoutError`.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                return await asyncio.shield(self._first_ready)
        except TimeoutError:
            missing = ", ".join(part.name for part in self.parts if not part.is_ready)
            raise StartTimeoutError(
                f"not ready after {timeout_seconds:g} s: {missing or 'the service'}"
            ) from None

    @property
    def _keepers(self) -> list[Keeper]:
        return [self._scheduler, *self._workers]

    def _keeper(self, spec: ChildSpec) -> Keeper:
        return Keeper(Child(spec), Part(spec.name, self._note_change))

    def _note_change(self, part: Part) -> None:
        self._changed.set()
        self._on_change(part)

    def _is_ready(self, snapshot: Snapshot) -> bool:
        return snapshot.serving and all(part.is_ready for part in self.parts)

    async def _watch(self) -> None:
        """Look at the scheduler while something is missing, and mark what has come up."""
        while True:
            self._changed.clear()
            snapshot = await self._probe.look()
            if snapshot is not None:
                self._mark_ready(snapshot)
            if snapshot is None or not self._is_ready(snapshot):
                await asyncio.sleep(_PROBE_INTERVAL_SECONDS)
                continue
            if not self._first_ready.done():
                self._first_ready.set_result(snapshot)
            await self._changed.wait()

    def _mark_ready(self, snapshot: Snapshot) -> None:
        for keeper in self._keepers:
            part = keeper.part
            answers = keeper is self._scheduler or part.name in snapshot.worker_ids
            if answers and part.state is State.STARTING and keeper.child.is_running:
                part.become(State.READY, f"after {part.seconds_in_state:.1f} s")

    async def _stop_children(self) -> None:
        """In the order in which nothing is cut off: requests end, then workers, then scheduler."""
        if self._scheduler.child.is_running and self._scheduler.part.is_ready:
            await self._probe.drain(self._grace_seconds)
        limit = self._grace_seconds + STOP_TIMEOUT_SECONDS
        await asyncio.gather(*(k.child.stop(limit) for k in self._workers))
        await self._scheduler.child.stop(limit)

    def _kill_all(self) -> None:
        for keeper in self._keepers:
            keeper.child.kill()


async def _run(errand: Callable[[], Awaitable[None]]) -> None:
    await errand()


async def _first_end(stop: asyncio.Task[None], work: Sequence[asyncio.Task[None]]) -> None:
    """Return when ``stop`` ends; raise the error of the first other task that fails."""
    pending: set[asyncio.Task[None]] = {stop, *work}
    while not stop.done():
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
