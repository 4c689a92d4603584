"""The demo from start to end: a service under each policy, the same burst through both."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

from rich.console import Console

from aptserve import AsyncClient, UnavailableError
from aptserve.cli.bench import play_trace
from aptserve.cli.demo import words
from aptserve.cli.demo.burst import Burst, plan_burst
from aptserve.cli.demo.report import Outcome, closing_sentence, closing_table, summarise
from aptserve.cli.demo.screen import Screen
from aptserve.cli.demo.stage import during_service
from aptserve.cli.demo.view import Phase, RunView
from aptserve.cli.demo.warm_up import slowdown, warm_up
from aptserve.types import Status

FIRST_POLICY = "fcfs"
_LOOK_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """The flags of ``aptserve demo``."""

    policy: str
    """What is compared with first come, first served."""
    seconds: float
    seed: int
    json: bool


def run_demo(options: DemoOptions, console: Console) -> None:
    """Show both runs on ``console``, and print the JSON for programs if asked for.

    Raises :class:`CommandError`; after Ctrl-C with exit code 130.
    """
    views = (RunView(FIRST_POLICY), RunView(options.policy))
    screen = Screen(console, views)
    with screen.shown():
        demo = asyncio.run(_Demo(options, screen).run(views))
    console.print()
    console.print(closing_table(demo.outcomes))
    console.print()
    console.print(f"[bold]{demo.sentence}[/] {words.CAVEAT}")
    if options.json:
        print(json.dumps(demo.document(), indent=2))


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What was played, and what came of it."""

    model: str
    device: str
    seed: int
    burst: Burst
    outcomes: tuple[Outcome, Outcome]

    @property
    def sentence(self) -> str:
        """The comparison in words."""
        return closing_sentence(*self.outcomes)

    def document(self) -> dict[str, object]:
        """For programs."""
        burst = self.burst
        return {
            "model": self.model,
            "device": self.device,
            "seed": self.seed,
            "num_requests": len(burst.trace),
            "num_long": burst.num_long,
            "requests_per_second": burst.trace.rate,
            "sustainable_requests_per_second": burst.sustainable_rate,
            "ttft_objective_seconds": burst.ttft_seconds,
            "tbt_objective_seconds": burst.tbt_seconds,
            "runs": [dataclasses.asdict(outcome) for outcome in self.outcomes],
            "sentence": self.sentence,
        }


class _Demo:
    """Both runs, one after the other."""

    def __init__(self, options: DemoOptions, screen: Screen) -> None:
        self._options = options
        self._screen = screen
        self._burst: Burst | None = None
        self._served: Status | None = None

    async def run(self, views: tuple[RunView, RunView]) -> DemoResult:
        """Play the burst under each policy."""
        self._screen.explain(words.STARTING)
        first = await self._run_policy(views[0])
        self._screen.explain(words.next_run(views[0].policy, views[1].policy))
        second = await self._run_policy(views[1])
        self._screen.explain("")
        assert self._burst is not None
        assert self._served is not None
        return DemoResult(
            model=self._served.model,
            device=self._served.workers[0].device,
            seed=self._options.seed,
            burst=self._burst,
            outcomes=(first, second),
        )

    async def _run_policy(self, view: RunView) -> Outcome:
        view.phase = Phase.STARTING

        async def errand(address: str, api_key: str | None) -> Outcome:
            async with AsyncClient(address, api_key=api_key) as client:
                return await self._play(client, api_key, view)

        return await during_service(view.policy, errand, self._screen.explain)

    async def _play(self, client: AsyncClient, api_key: str | None, view: RunView) -> Outcome:
        view.phase = Phase.WARMING_UP
        if self._burst is None:
            self._screen.explain(words.MEASURING)
        batch_seconds = await warm_up(client)
        before = await client.status()
        if self._burst is None:
            self._burst = await self._plan_burst(client, before, batch_seconds)
        burst = self._burst
        self._screen.explain(words.about(view.policy))
        view.start(len(burst.trace))
        async with self._looking(client, view):
            live = await play_trace(
                burst.trace,
                ttft_seconds=burst.ttft_seconds,
                tbt_seconds=burst.tbt_seconds,
                address=client.address,
                api_key=api_key,
                seed=self._options.seed,
                timeout_seconds=burst.give_up_seconds,
                on_record=view.on_record,
            )
        view.end()
        after = await client.status()
        view.on_status(after)
        return summarise(
            view.policy, live.records, live.duration_seconds, before.totals, after.totals
        )

    async def _plan_burst(self, client: AsyncClient, status: Status, batch_seconds: float) -> Burst:
        model = await client.get_model()
        worker = status.workers[0]
        burst = plan_burst(
            worker,
            slowdown(batch_seconds, worker.calibration),
            model.context_length,
            seconds=self._options.seconds,
            seed=self._options.seed,
        )
        self._served = status
        self._screen.note(
            words.about_burst(burst, worker),
            words.about_tiers(worker),
            words.about_objectives(burst),
        )
        return burst

    @contextlib.asynccontextmanager
    async def _looking(self, client: AsyncClient, view: RunView) -> AsyncIterator[None]:
        """Ask the service for its state all along the block."""

        async def look() -> None:
            while True:
                # A service that is being started again is seen on its next look.
                with contextlib.suppress(UnavailableError):
                    view.on_status(await client.status())
                    self._screen.on_status(view)
                await asyncio.sleep(_LOOK_SECONDS)

        looks = asyncio.create_task(look())
        try:
            yield
        finally:
            looks.cancel()
            await asyncio.wait({looks})
        if not looks.cancelled():
            looks.result()
