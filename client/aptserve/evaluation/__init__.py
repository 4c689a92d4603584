"""What became of the requests of a run, live or simulated."""

from aptserve.evaluation.records import RequestRecord

__all__ = ["RequestRecord"]
