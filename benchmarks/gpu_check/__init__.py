"""Everything that only a GPU can show, in one command: right results, then how fast.

``python -m benchmarks.gpu_check`` needs this repository, torch and Triton; parts that need more say
so and are left out where it is missing.
"""
