"""GPUs as data, and how long their kernels take.

Every formula is a roofline: bytes over bandwidth and FLOP over peak, each times the share of the
data sheet's figure that kernels were measured to reach, joined as the root of the sum of squares
(which is the larger of the two, rounded where they meet), and a floor that the smallest kernel
takes. All numbers are 16-bit, two bytes each. Amounts may be floats or arrays of any one shape;
seconds come out alike.

``benchmarks/cost_model.py`` fits the shares to public timings of A100 and H100 kernels (Vidur and
aiconfigurator) and writes the errors to ``benchmarks/results/cost_model.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Amount = float | npt.NDArray[np.float64]

BYTES_PER_NUMBER = 2
_GIB = 2.0**30
_ROWS_OF_A_TILE = 16
"""Query rows that a tensor core takes at once; fewer cost as much."""


@dataclass(frozen=True, slots=True)
class Link:
    """All-reduce among some ranks: ``seconds + bytes / bytes_per_second``."""

    seconds: float
    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What kernels reach, as shares of the data sheet's bandwidth and FLOP/s; floors in seconds."""

    gemm_floor: float
    gemm_bandwidth: float
    gemm_compute: float
    gemm_extra_rows: float
    """Rows by which a product's arithmetic is dearer than its shape: part-filled tiles."""
    decode_floor: float
    decode_bandwidth: float
    decode_blocks: float
    """Independent parts of the work (a KV head of a sequence each) at which a decode kernel takes
    1.4 times as long as the bandwidth allows; fewer leave more of the GPU idle."""
    prefill_floor: float
    prefill_compute: float
    prefill_extra_keys: float
    """Keys by which each query row is dearer than those it attends to."""
    elementwise_floor: float
    elementwise_bandwidth: float
    links: Mapping[int, Link] = field(default_factory=dict)
    """By number of ranks."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU: the data sheet's figures and the measured shares of them."""

    name: str
    memory_bytes: float
    """As CUDA reports it, which is a little less than is printed on the box."""
    bandwidth: float
    """Bytes per second."""
    flops: float
    """Dense 16-bit FLOP per second."""
    efficiency: Efficiency
    source: str
    """Where ``efficiency`` is from."""

    def gemm_seconds(self, rows: Amount, outputs: Amount, inputs: Amount) -> Any:
        """Product of [rows, inputs] and weights [inputs, outputs]."""
        e = self.efficiency
        numbers = inputs * outputs + rows * (inputs + outputs)
        memory = BYTES_PER_NUMBER * numbers / (self.bandwidth * e.gemm_bandwidth)
        operations = 2.0 * (rows + e.gemm_extra_rows) * inputs * outputs
        compute = operations / (self.flops * e.gemm_compute)
        return e.gemm_floor + np.sqrt(memory * memory + compute * compute)

    def elementwise_seconds(self, num_kernels: float, numbers: Amount) -> Any:
        """``num_kernels`` norms, activations and the like; ``numbers`` read and written by all."""
        e = self.efficiency
        traffic = BYTES_PER_NUMBER * numbers / (self.bandwidth * e.elementwise_bandwidth)
        return num_kernels * e.elementwise_floor + traffic

    def decode_attention_seconds(
        self, numbers: Amount, blocks: Amount, operations: Amount = 0.0
    ) -> Any:
        """One query row per sequence over its cache.

        ``numbers`` are read and written, ``blocks`` are the independent parts of the work (a
        sequence's KV head each), ``operations`` the FLOP where they may matter.
        """
        e = self.efficiency
        memory = BYTES_PER_NUMBER * numbers / (self.bandwidth * e.decode_bandwidth)
        alone = memory * (e.decode_blocks / blocks)
        compute = operations / (self.flops * e.prefill_compute)
        return e.decode_floor + np.sqrt(memory * memory + alone * alone + compute * compute)

    def prefill_attention_seconds(
        self, pairs: Amount, rows: Amount, numbers: Amount, width: Amount
    ) -> Any:
        """Many query rows per sequence.

        ``pairs`` of a query row and a key it sees, ``rows`` in all, heads times head size
        ``width``; ``numbers`` are queries, keys, values and results together.
        """
        e = self.efficiency
        operations = 4.0 * width * (pairs + e.prefill_extra_keys * rows)
        compute = operations / (self.flops * e.prefill_compute)
        memory = BYTES_PER_NUMBER * numbers / (self.bandwidth * e.decode_bandwidth)
        return e.prefill_floor + np.sqrt(memory * memory + compute * compute)

    def all_reduce_seconds(self, ranks: int, numbers: Amount) -> Any:
        """Sum over ``ranks`` GPUs of ``numbers`` on each; one rank has nothing to add."""
        if ranks == 1:
            return 0.0 * numbers
        link = self.efficiency.links[ranks]
        return link.seconds + BYTES_PER_NUMBER * numbers / link.bytes_per_second


def tile_rows(rows: int) -> int:
    """Rows that the tensor cores compute for so many."""
    return -(-rows // _ROWS_OF_A_TILE) * _ROWS_OF_A_TILE


# Fitted by benchmarks/cost_model.py. Median (P90) relative errors, A100 / H100: products 7 (21) /
# 8 (22) %, decode attention 8 (28) / 7 (28) %, prefill attention 8 (31) / 6 (31) %; layers without
# attention of models that had no part in the fit 2 to 4 (9) / 4 (13) %. Grouped-query attention is
# much worse, at 38 (83) % for decodes on the A100.
_A100 = Efficiency(
    gemm_floor=5.3769e-6,
    gemm_bandwidth=0.76576,
    gemm_compute=0.74443,
    gemm_extra_rows=5.8971,
    decode_floor=1.0906e-5,
    decode_bandwidth=0.74198,
    decode_blocks=60.036,
    prefill_floor=1.2157e-5,
    prefill_compute=0.58111,
    prefill_extra_keys=401.33,
    elementwise_floor=3.0249e-6,
    elementwise_bandwidth=0.47827,
    links={2: Link(4.535e-5, 1.721e11), 4: Link(4.820e-5, 1.149e11)},
)
_H100 = Efficiency(
    gemm_floor=4.0462e-6,
    gemm_bandwidth=0.88520,
    gemm_compute=0.75491,
    gemm_extra_rows=0.50133,
    decode_floor=1.2544e-5,
    decode_bandwidth=0.87874,
    decode_blocks=1.5883,
    prefill_floor=1.2912e-5,
    prefill_compute=0.69704,
    prefill_extra_keys=1017.6,
    elementwise_floor=2.7493e-6,
    elementwise_bandwidth=0.53998,
    links={2: Link(2.610e-5, 3.240e11), 4: Link(3.134e-5, 2.531e11)},
)


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40g", 39.6 * _GIB, 1.555e12, 312e12, _A100, "A100 80 GB timings, same shares"),
        Gpu("a100-80g", 79.1 * _GIB, 2.039e12, 312e12, _A100, "timings of this GPU"),
        Gpu("h100", 79.1 * _GIB, 3.35e12, 989e12, _H100, "timings of this GPU"),
        Gpu("h200", 139.8 * _GIB, 4.8e12, 989e12, _H100, "H100 timings, same shares"),
        Gpu(
            "a40",
            44.4 * _GIB,
            0.696e12,
            149.7e12,
            replace(_A100, links={}),
            "assumed to reach the A100's shares",
        ),
        Gpu(
            "l4",
            22.0 * _GIB,
            0.3e12,
            121e12,
            replace(_A100, links={}),
            "assumed to reach the A100's shares",
        ),
    )
}
