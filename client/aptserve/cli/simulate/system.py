"""The simulated machines that flags ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aptserve.cli.problems import usage_error

if TYPE_CHECKING:
    from aptserve_scheduler.sim import SimWorker

DEFAULT_MODEL = "opt-13b"
DEFAULT_GPU = "a100-40g"
DEFAULT_TIERS = ("kv", "hidden")


@dataclass(frozen=True, slots=True)
class System:
    """Workers, what to call them, and what their model can take."""

    name: str
    model: str
    """Empty for workers known by their calibration."""
    workers: tuple[SimWorker, ...]
    max_total_tokens: int
    """Of prompt and output together."""


def system_of(
    model: str | None,
    gpu: str | None,
    tiers: Sequence[str] | None,
    hidden_attention: str | None,
    calibration: Path | None,
    num_workers: int,
) -> System:
    """What is to be simulated; :class:`CommandError` names the flag that is wrong."""
    if calibration is None:
        return _from_names(
            model or DEFAULT_MODEL,
            gpu or DEFAULT_GPU,
            tuple(tiers or DEFAULT_TIERS),
            hidden_attention,
            num_workers,
        )
    others = {
        "--model": model,
        "--gpu": gpu,
        "--tiers": tiers,
        "--hidden-attention": hidden_attention,
    }
    for flag, value in others.items():
        if value is not None:
            raise usage_error(f"{flag}: --calibration says it already")
    return _from_calibration(calibration, num_workers)


def _from_names(
    model: str, gpu: str, tiers: tuple[str, ...], hidden_attention: str | None, num_workers: int
) -> System:
    from aptserve_scheduler.sim.cost import MODELS, gpu_names, make_worker, model_names

    _check("--model", model, model_names())
    _check("--gpu", gpu, gpu_names())
    for tier in tiers:
        _check("--tiers", tier, DEFAULT_TIERS)
    if tiers[0] != "kv":
        raise usage_error("--tiers: must start with kv")
    shape = MODELS[model]
    form = hidden_attention or ("projected" if shape.rotary else "absorbed")
    try:
        worker = make_worker(model, gpu, tiers=tiers, hidden_attention=form)
    except ValueError as error:
        flag = "--tiers, --hidden-attention" if "hidden" in tiers else "--model, --gpu"
        raise usage_error(f"{flag}: {error}") from None
    how = "+".join(f"{tier} ({form})" if tier == "hidden" else tier for tier in tiers)
    return _system(
        f"{model} on {gpu}, {how}", model, worker, num_workers, _context(shape.num_positions)
    )


def _from_calibration(path: Path, num_workers: int) -> System:
    from aptserve_scheduler.sim.calibration import load_worker

    try:
        worker = load_worker(path)
    except (OSError, ValueError) as error:
        raise usage_error(f"--calibration: {error}") from None
    tiers = "+".join(spec.tier.name.lower() for spec in worker.spec.tiers)
    return _system(f"{worker.spec.worker_id} as measured, {tiers}", "", worker, num_workers, None)


def _system(
    name: str, model: str, worker: SimWorker, num_workers: int, context_tokens: int | None
) -> System:
    from aptserve_scheduler.core import WorkerId
    from aptserve_scheduler.sim.runs import largest_request

    workers = tuple(
        dataclasses.replace(
            worker, spec=dataclasses.replace(worker.spec, worker_id=WorkerId(f"sim-{number}"))
        )
        for number in range(num_workers)
    )
    limit = largest_request(workers)
    return System(
        name if num_workers == 1 else f"{num_workers} x {name}",
        model,
        workers,
        limit if context_tokens is None else min(limit, context_tokens),
    )


def _check(flag: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise usage_error(f"{flag}: {name!r} is none of {', '.join(known)}")


def _context(num_positions: int) -> int | None:
    """Tokens that a table of position embeddings is for; OPT's has two rows more than that."""
    return num_positions - 2 if num_positions else None
