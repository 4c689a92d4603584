"""The study of schedulers on simulated GPUs: ``python -m benchmarks.study``, kept in docs/study."""
