"""A simulated twin of a worker that was measured: read from what ``aptserve bench --json`` wrote.

The file's section ``workers`` has an object for each worker, as ``GetStatus`` told it after the
run; ``calibration`` in it is the scheduler's estimate of the worker's speed at that moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator

from aptserve_scheduler.arrays import Ints, Tiers
from aptserve_scheduler.core import CostCoefficients, Tier, TierSpec, WorkerId, WorkerSpec
from aptserve_scheduler.core.cost import CostModel, features
from aptserve_scheduler.sim.worker import Amount, SimWorker


class CalibrationError(ValueError):
    """A file that describes no worker; one line that says where."""


class LinearCost:
    """A worker whose iterations take exactly what the linear form of :mod:`core.cost` says."""

    def __init__(self, coefficients: CostCoefficients, tiers: tuple[Tier, ...]) -> None:
        """``tiers`` in the order of the worker's. ValueError: a coefficient is negative."""
        self._model = CostModel(coefficients, tiers)
        self._tiers = tiers
        self._base = coefficients.base_seconds
        self._per_decode = coefficients.seconds_per_token + coefficients.seconds_per_sequence
        per_cached = coefficients.seconds_per_cached_token
        self._per_cached = [per_cached.get(tier, 0.0) for tier in tiers]

    def seconds(self, num_cached: Ints, num_new: Ints, tiers: Tiers) -> float:
        """As :meth:`StepCost.seconds`."""
        return self._model.seconds(features(num_cached, num_new, tiers, self._tiers))

    def decode_seconds(self, num_sequences: Sequence[int], num_cached: Sequence[Amount]) -> Amount:
        """As :meth:`StepCost.decode_seconds`."""
        seconds = self._base + self._per_decode * sum(num_sequences)
        for per_cached, cached in zip(self._per_cached, num_cached, strict=True):
            seconds = seconds + per_cached * cached
        return seconds


def load_worker(path: Path) -> SimWorker:
    """The only worker of a run; :class:`CalibrationError` where there were several."""
    workers = load_workers(path)
    if len(workers) > 1:
        raise CalibrationError(f"{path}: workers: there are {len(workers)}, one is wanted")
    return workers[0]


def load_workers(path: Path) -> tuple[SimWorker, ...]:
    """All workers of a run, at least one. :class:`CalibrationError`, or OSError."""
    try:
        document = _Document.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        where = f"{path}: {place}" if place else str(path)
        raise CalibrationError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
    return tuple(worker.twin() for worker in document.workers)


_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_TierName = Literal["kv", "hidden"]


class _Part(BaseModel):
    """A part of the file. What is not read here, such as the use of the pool, may be there."""

    model_config = ConfigDict(frozen=True, strict=True)


class _TierSeconds(_Part):
    tier: _TierName
    seconds_per_cached_token: _Seconds


class _Calibration(_Part):
    base_seconds: _Seconds
    seconds_per_token: _Seconds
    seconds_per_sequence: _Seconds
    seconds_per_attention_pair: _Seconds
    tiers: list[_TierSeconds]

    def coefficients(self) -> CostCoefficients:
        return CostCoefficients(
            base_seconds=self.base_seconds,
            seconds_per_token=self.seconds_per_token,
            seconds_per_sequence=self.seconds_per_sequence,
            seconds_per_attention_pair=self.seconds_per_attention_pair,
            seconds_per_cached_token={
                Tier[tier.tier.upper()]: tier.seconds_per_cached_token for tier in self.tiers
            },
        )


class _Tier(_Part):
    tier: _TierName
    units_per_block: PositiveInt
    exact: bool


class _Worker(_Part):
    worker_id: str = Field(min_length=1)
    num_units: PositiveInt
    block_size: PositiveInt
    tiers: list[_Tier] = Field(min_length=1)
    max_num_seqs: PositiveInt
    max_num_batched_tokens: PositiveInt
    calibration: _Calibration

    @field_validator("tiers")
    @classmethod
    def _starts_with_kv(cls, tiers: list[_Tier]) -> list[_Tier]:
        if tiers[0].tier != "kv":
            raise ValueError("must start with kv")
        return tiers

    def twin(self) -> SimWorker:
        tiers = tuple(
            TierSpec(Tier[tier.tier.upper()], tier.units_per_block, tier.exact)
            for tier in self.tiers
        )
        cost = self.calibration.coefficients()
        spec = WorkerSpec(
            worker_id=WorkerId(self.worker_id),
            num_units=self.num_units,
            block_size=self.block_size,
            tiers=tiers,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            cost=cost,
        )
        return SimWorker(spec, LinearCost(cost, tuple(tier.tier for tier in tiers)))


class _Document(_Part):
    workers: list[_Worker] = Field(min_length=1)
