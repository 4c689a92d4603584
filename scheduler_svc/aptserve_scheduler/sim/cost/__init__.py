"""How long iterations take on GPUs that are not here: a roofline fitted to public timings."""

from aptserve_scheduler.sim.cost.estimate import Estimate, fit_estimate
from aptserve_scheduler.sim.cost.hardware import GPUS, Efficiency, Gpu, Link
from aptserve_scheduler.sim.cost.models import MODELS, ModelShape
from aptserve_scheduler.sim.cost.step import HOST_SECONDS, HiddenAttention, StepModel
from aptserve_scheduler.sim.cost.worker import gpu_names, make_worker, model_names

__all__ = [
    "GPUS",
    "HOST_SECONDS",
    "MODELS",
    "Efficiency",
    "Estimate",
    "Gpu",
    "HiddenAttention",
    "Link",
    "ModelShape",
    "StepModel",
    "fit_estimate",
    "gpu_names",
    "make_worker",
    "model_names",
]
