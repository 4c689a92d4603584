"""What the operator reads once everything is ready."""

from __future__ import annotations

import shlex

from rich.console import Console
from rich.table import Table

from aptserve import AptServeError, AsyncClient, WorkerStatus
from aptserve.cli.generation import summary
from aptserve.cli.options import DEFAULT_ADDRESS
from aptserve.cli.supervisor.probe import Snapshot
from aptserve.cli.values import format_bytes

EXAMPLE_PROMPT = "def fibonacci(n):"
_FIRST_ANSWER_TOKENS = 64


def announce(console: Console, address: str, log_dir: object, snapshot: Snapshot) -> None:
    """Print address, model, pools and what to try next."""
    status = snapshot.status
    table = Table.grid(padding=(0, 2))
    table.add_row("address", f"[bold]{address}[/]")
    table.add_row("model", status.model)
    table.add_row("policy", f"{status.policy}, pipeline depth {status.pipeline_depth}")
    for worker in sorted(status.workers, key=lambda worker: worker.worker_id):
        table.add_row(worker.worker_id, pool_summary(worker))
    if log_dir is not None:
        table.add_row("logs", str(log_dir))
    console.print()
    console.print(table)
    console.print("\nTry, in another terminal:")
    where = "" if address == DEFAULT_ADDRESS else f" --address {address}"
    console.print(f"  aptserve generate {shlex.quote(EXAMPLE_PROMPT)}{where}", style="bold")
    console.print(f"  aptserve status --watch{where}\n", style="bold")


def pool_summary(worker: WorkerStatus) -> str:
    """``cpu, 4096 units of 16 tokens (64.0 MiB), kv 2 units per block, hidden 1``."""
    size = format_bytes(worker.num_units * worker.unit_bytes)
    tiers = ", ".join(f"{tier.tier.value} {tier.units_per_block}" for tier in worker.tiers)
    return (
        f"{worker.device}, {worker.num_units} units of {worker.block_size} tokens ({size}); "
        f"units per block: {tiers}"
    )


async def answer_first_prompt(
    console: Console, address: str, api_key: str | None, prompt: str
) -> None:
    """Stream one answer to the screen; what fails is said, and does not end the service."""
    console.print(prompt, style="bold", end="", markup=False)
    async with AsyncClient(address, api_key=api_key) as client:
        try:
            async with client.generate(prompt, max_tokens=_FIRST_ANSWER_TOKENS) as stream:
                async for chunk in stream:
                    console.out(chunk.text, end="")
        except AptServeError as error:
            console.print(f"\n{error.message}\n", style="red", markup=False)
            return
    console.print(f"\n{summary(stream.result)}\n", style="dim")
