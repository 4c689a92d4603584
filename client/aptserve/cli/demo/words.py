"""The sentences of the demo."""

from __future__ import annotations

import inspect

from aptserve.cli.demo.burst import Burst
from aptserve.cli.values import format_bytes, format_seconds
from aptserve.types import Tier, WorkerStatus

TITLE = "The same burst of requests, the same model, the same memory: two schedulers"
STARTING = "Starting a scheduler and a worker that serves a small language model on this machine."
MEASURING = (
    "Warming up, and measuring how fast this machine is: the burst shall ask for more memory "
    "than there is, but not for more arithmetic."
)
CAVEAT = "One burst is an example and no proof; aptserve simulate compares over many."

_ABOUT = {
    "fcfs": "first come, first served. A long prompt at the head of the queue waits for much "
    "memory and holds back everyone behind it.",
    "apt-slo": "asks before every step which requests can still meet their objectives, serves "
    "those by deadline, puts off the costliest when memory or time runs out, and may hold a "
    "request's cache as hidden states, at half the memory.",
    "apt": "picks before every step the requests that relieve the most waiting per unit of "
    "memory, and may hold a request's cache as hidden states, at half the memory.",
}
"""For readers who are new to this; other policies speak for themselves."""


def about(policy: str) -> str:
    """What a policy does, in a sentence or two."""
    if policy in _ABOUT:
        return f"{policy}: {_ABOUT[policy]}"
    from aptserve_scheduler.policies.registry import create_policy

    explanation = inspect.getdoc(inspect.getmodule(type(create_policy(policy)))) or ""
    text = " ".join(explanation.partition("\n\n")[0].split())
    return f"{policy}: {text}"


def about_burst(burst: Burst, worker: WorkerStatus) -> str:
    """What is offered, and what it is short of."""
    seconds = format_seconds(float(burst.trace.arrival_seconds[-1]))
    pool = format_bytes(worker.num_units * worker.unit_bytes)
    return (
        f"{len(burst.trace)} requests arrive within {seconds}, {burst.num_long} of them with a "
        f"long prompt. While a request runs, its attention cache needs memory, and the pool of "
        f"{worker.num_units} units ({pool}) is too small for all."
    )


def about_objectives(burst: Burst) -> str:
    """When a request counts as met."""
    return (
        f"A request meets its objectives when its first token comes within "
        f"{burst.ttft_seconds:g} s (TTFT) and 99 % of the times between its tokens (TBT) are "
        f"within {burst.tbt_seconds:g} s. A client gives up after {burst.give_up_seconds:g} s."
    )


def about_tiers(worker: WorkerStatus) -> str:
    """What the parts of the pool are."""
    text = "In memory: kv, caches held as keys and values"
    size = {tier.tier: tier.units_per_block for tier in worker.tiers}
    if Tier.HIDDEN in size:
        share = size[Tier.HIDDEN] / size[Tier.KV]
        text += f"; hidden, as the hidden states that those follow from, {share:.0%} as large"
    return f"{text}."


def next_run(first: str, second: str) -> str:
    """Between the runs."""
    return f"{first} is done. Now the very same requests at the same times under {second}."
