"""The status of a service as tables, and a plan as a line."""

from __future__ import annotations

from collections import Counter
from math import ceil

from rich.console import Group
from rich.table import Table
from rich.text import Text

from aptserve.cli.values import format_bytes, format_seconds
from aptserve.types import PlanReport, Status, WorkerStatus

_BAR_WIDTH = 24
_FULL_SHARE = 0.9


def status_view(status: Status) -> Group:
    """Everything that ``aptserve status`` shows."""
    return Group(_service_table(status), Text(), _worker_table(status), Text(), _totals(status))


def plan_line(plan: PlanReport) -> Text:
    """One plan: what runs in which tier, why, and what the pool holds."""
    new_tokens = sum(request.num_new_tokens for request in plan.planned)
    tiers = ", ".join(
        f"{count} {tier.value}" for tier, count in Counter(r.tier for r in plan.planned).items()
    )
    line = Text.assemble(
        (f"{plan.worker_id} #{plan.plan_id}", "bold"),
        f"  {len(plan.planned)} requests ({tiers or 'none'}), {new_tokens} tokens",
        f", {plan.num_waiting} waiting, {plan.num_used_units} units",
        (f"  {format_seconds(plan.decision_seconds)}", "dim"),
        (f"  {plan.reason}", "cyan"),
    )
    if plan.preempted_request_ids:
        line.append(f"  preempted {', '.join(plan.preempted_request_ids)}", "yellow")
    if plan.promoted_request_ids:
        line.append(f"  promoted {', '.join(plan.promoted_request_ids)}", "green")
    if plan.num_dropped:
        line.append(f"  ({plan.num_dropped} plans missed)", "red")
    return line


def _service_table(status: Status) -> Table:
    table = Table.grid(padding=(0, 2))
    state = "[green]accepting[/]" if status.accepting else "[yellow]not accepting[/]"
    table.add_row("service", f"{state}, up {format_seconds(status.uptime_seconds)}")
    table.add_row("model", status.model or "[dim]none: no worker has attached[/]")
    table.add_row("policy", f"{status.policy}, pipeline depth {status.pipeline_depth}")
    waiting = f"{status.num_waiting} waiting"
    if status.num_waiting:
        waiting += f" (longest {format_seconds(status.oldest_wait_seconds)})"
    table.add_row("requests", f"{status.num_running} running, {waiting}")
    table.add_row("scheduler", f"version {status.version}, {format_bytes(status.resident_bytes)}")
    return table


def _worker_table(status: Status) -> Table:
    table = Table.grid(padding=(0, 2))
    for worker in sorted(status.workers, key=lambda worker: worker.worker_id):
        tiers = "; ".join(
            f"{tier.tier.value} {tier.num_used_units} units, {tier.num_sequences} requests"
            for tier in worker.tiers
        )
        table.add_row(Text(worker.worker_id, "bold"), _pool_bar(worker))
        table.add_row("", tiers)
        memory = format_bytes(worker.resident_bytes)
        steps = f"{worker.num_steps} steps, {worker.gap_share:.1%} of the time between them"
        table.add_row("", f"[dim]{worker.device}, {memory}, {steps}[/]")
    if not status.workers:
        table.add_row("[yellow]no worker is attached[/]")
    return table


def _pool_bar(worker: WorkerStatus) -> Text:
    share = worker.num_used_units / max(worker.num_units, 1)
    filled = min(_BAR_WIDTH, ceil(share * _BAR_WIDTH))
    free = worker.num_units - worker.num_used_units
    return Text.assemble(
        ("█" * filled, "red" if share > _FULL_SHARE else "green"),
        ("░" * (_BAR_WIDTH - filled), "dim"),
        f"  {worker.num_used_units} of {worker.num_units} units used, {free} free",
    )


def _totals(status: Status) -> Table:
    totals = status.totals
    table = Table.grid(padding=(0, 2))
    table.add_row(
        "[dim]since start[/]",
        f"{totals.num_accepted} accepted, {totals.num_finished} finished, "
        f"{totals.num_aborted} aborted, {totals.num_failed} failed, "
        f"{totals.num_rejected} rejected",
    )
    met = totals.num_objectives_met
    share = f" ({met / totals.num_finished:.0%})" if totals.num_finished else ""
    table.add_row("", f"{met} met their objectives{share}")
    table.add_row(
        "",
        f"{totals.num_prompt_tokens} prompt tokens, {totals.num_output_tokens} output tokens, "
        f"{totals.num_preemptions} preemptions, {totals.num_promotions} promotions",
    )
    return table
