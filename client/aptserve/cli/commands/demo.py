"""``demo``: the command that explains the project."""

from __future__ import annotations

from typing import Annotated

import typer

from aptserve.cli import options as opt

_SHORTEST_SECONDS, _LONGEST_SECONDS = 5.0, 600.0


def demo(
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            metavar="NAME",
            show_default="the service's own",
            help="What to compare with first come, first served.",
        ),
    ] = None,
    seconds: Annotated[
        float,
        opt.duration(
            "--seconds",
            default="25s",
            description="Length of each of the two runs, 5 s at least; the start comes on top.",
        ),
    ] = 25.0,
    seed: Annotated[
        int, typer.Option("--seed", metavar="NUMBER", min=0, help="Another number, another burst.")
    ] = 0,
    json: opt.Json = False,
) -> None:
    """See in a minute what this is about: one burst of requests under two schedulers.

    A small model is served on this machine with little memory for attention caches, first come,
    first served, and then under the policy. The screen shows the queue, the memory and how many
    requests met their objectives. With --json the screen goes to standard error.

    [bold]Examples[/]
      aptserve demo
      aptserve demo --policy chunked --seed 7
      aptserve demo --json > demo.json
    """
    from rich.console import Console

    from aptserve.cli.services import load_scheduler_settings, load_worker_settings

    # First, for these say in one line which package is missing.
    chosen = load_scheduler_settings({"policy": policy}).policy
    load_worker_settings({})
    from aptserve.cli.demo.run import DemoOptions, run_demo

    if not _SHORTEST_SECONDS <= seconds <= _LONGEST_SECONDS:
        raise typer.BadParameter(
            f"must be in [{_SHORTEST_SECONDS:g}, {_LONGEST_SECONDS:g}] seconds, not {seconds:g}",
            param_hint="--seconds",
        )
    run_demo(DemoOptions(chosen, seconds, seed, json), Console(stderr=json, highlight=False))
