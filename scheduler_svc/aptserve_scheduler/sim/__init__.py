"""A discrete-event simulator around the very scheduler core and policies that serve live."""

from aptserve_scheduler.sim.engine import SimConfig, SimResult, simulate
from aptserve_scheduler.sim.timeline import Timeline
from aptserve_scheduler.sim.worker import SimWorker, StepCost

__all__ = ["SimConfig", "SimResult", "SimWorker", "StepCost", "Timeline", "simulate"]
