"""Choosing the next token, row by row, independent of the rest of the batch."""

from aptserve_worker.sampling.sampler import Choice, Sampled, Sampler

__all__ = ["Choice", "Sampled", "Sampler"]
