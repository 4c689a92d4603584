"""Choosing the next token, row by row, independent of the rest of the batch."""

from aptserve_worker.sampling.sampler import Sampled, Sampler

__all__ = ["Sampled", "Sampler"]
