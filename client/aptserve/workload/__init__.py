"""Workloads: what a benchmark or a simulation plays.

``load_workload("sharegpt", num_requests=1000, seed=0, rate=4.0, cv=5.0)`` gives a :class:`Trace`;
so does the path of a published trace. Needs numpy.
"""

from aptserve.workload.lengths import HUMANEVAL, LENGTH_MODELS, LONGBENCH, SHAREGPT, LengthModel
from aptserve.workload.load import DEFAULT_NUM_REQUESTS, load_workload, workload_names
from aptserve.workload.operations import clipped, sampled, scaled_to_rate, with_gamma_arrivals
from aptserve.workload.readers import read_workload
from aptserve.workload.records import TraceFormatError
from aptserve.workload.servegen import read_servegen
from aptserve.workload.trace import Lengths, Trace

__all__ = [
    "DEFAULT_NUM_REQUESTS",
    "HUMANEVAL",
    "LENGTH_MODELS",
    "LONGBENCH",
    "SHAREGPT",
    "LengthModel",
    "Lengths",
    "Trace",
    "TraceFormatError",
    "clipped",
    "load_workload",
    "read_servegen",
    "read_workload",
    "sampled",
    "scaled_to_rate",
    "with_gamma_arrivals",
    "workload_names",
]
