"""What became of the requests of a run, live or simulated.

:class:`RequestRecord` -> :func:`report_of` -> :class:`RunReport`; runs and goodput searches make an
:class:`Evaluation`, from which tables, JSON, figures and a page are made. Needs numpy, intervals
scipy, figures matplotlib.
"""

from aptserve.evaluation.evaluation import Evaluation, Summary
from aptserve.evaluation.goodput import (
    Bound,
    FoundRate,
    Goodput,
    GoodputSearch,
    SearchLimits,
    crossing,
    find_goodput,
    goodput_of,
)
from aptserve.evaluation.intervals import Estimate, estimate, wilson_interval
from aptserve.evaluation.records import RequestRecord
from aptserve.evaluation.report import Cell, Percentiles, RunReport, report_of
from aptserve.evaluation.timeline import PoolTimeline

__all__ = [
    "Bound",
    "Cell",
    "Estimate",
    "Evaluation",
    "FoundRate",
    "Goodput",
    "GoodputSearch",
    "Percentiles",
    "PoolTimeline",
    "RequestRecord",
    "RunReport",
    "SearchLimits",
    "Summary",
    "crossing",
    "estimate",
    "find_goodput",
    "goodput_of",
    "report_of",
    "wilson_interval",
]
