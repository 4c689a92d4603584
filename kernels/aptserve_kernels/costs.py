"""What every kernel has to move and compute, as formulas, and the least time that takes on a GPU.

Each formula counts what one layer needs once: an operand that several programs read counts one time
(the L2 cache serves the rest), and one that must make two trips through memory counts two times.
Lengths, scales of a softmax and elementwise arithmetic are left out: all are under a hundredth.
A multiplication and an addition are 2 FLOP. Symbols, for all of a batch's B sequences:

    L  cached tokens of a sequence, new ones included     d   hidden size
    N  new tokens of a sequence                           H   heads, of h elements
    b  bytes of an element                                G   heads of K (and of V); g = G · h

These are calculations, not measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aptserve_kernels.geometry import UnitGeometry

_INDEX_BYTES = 8
_FLOAT_BYTES = 4
_SCALE_BYTES = 2
"""A scale of the 8-bit tier, float16."""

_READS_OF_HIDDEN = 2
"""Decode attention reads a hidden state once for its scores and once for its sum."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer and a batch of equal sequences; names as in the module's text."""

    batch: int
    context: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    new_tokens: int = 1
    element_bytes: int = 2
    block_size: int = 16

    @property
    def kv_width(self) -> int:
        """g: elements of one token's keys, and of its values."""
        return self.num_kv_heads * self.head_dim

    @property
    def query_width(self) -> int:
        """H · h: elements of one row of queries, and of the results."""
        return self.num_heads * self.head_dim

    @property
    def geometry(self) -> UnitGeometry:
        return UnitGeometry.of(
            block_size=self.block_size,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            hidden_size=self.hidden_size,
        )

    def table_bytes(self, units_per_block: int) -> int:
        """Unit numbers of all blocks: 8 bytes each."""
        blocks = self.geometry.num_blocks(self.context)
        return self.batch * blocks * units_per_block * _INDEX_BYTES


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes read from and written to the GPU's memory, and FLOP."""

    read_bytes: int
    write_bytes: int
    flop: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.read_bytes + other.read_bytes,
            self.write_bytes + other.write_bytes,
            self.flop + other.flop,
        )

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read_bytes + self.write_bytes

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flop / self.bytes


@dataclass(frozen=True, slots=True)
class Gpu:
    """Published peaks: bytes per second, and dense bfloat16 FLOP per second with tensor cores."""

    bandwidth: float
    flops: float

    @property
    def ridge(self) -> float:
        """FLOP per byte above which arithmetic, not memory, is the bound."""
        return self.flops / self.bandwidth


GPUS: Mapping[str, Gpu] = {
    "A100-40G": Gpu(1.555e12, 312e12),
    "A100-80G": Gpu(2.039e12, 312e12),
    "H100": Gpu(3.35e12, 989e12),
}
"""SXM versions; from NVIDIA's data sheets "A100 Tensor Core GPU" (2021) and "H100 Tensor Core GPU"
(2023; its figure of 1,979 TFLOP/s is with sparsity)."""


def roofline_seconds(cost: Cost, gpu: Gpu) -> float:
    """The longer of the bytes at full bandwidth and the FLOP at full speed; no kernel is faster."""
    return max(cost.bytes / gpu.bandwidth, cost.flop / gpu.flops)


def bound(cost: Cost, gpu: Gpu) -> str:
    """What that time is spent on: ``memory`` or ``compute``."""
    return "memory" if cost.intensity < gpu.ridge else "compute"


def kv_token_bytes(s: Shape) -> int:
    """Keys and values of a token in one layer: ``2 · g · b``."""
    return 2 * s.kv_width * s.element_bytes


def hidden_token_bytes(s: Shape) -> int:
    """Hidden state of a token in one layer: ``d · b``."""
    return s.hidden_size * s.element_bytes


def kv8_token_bytes(s: Shape) -> int:
    """Codes of one byte and a scale per head: ``2 · g + 2 · G · 2``."""
    return 2 * s.kv_width + 2 * s.num_kv_heads * _SCALE_BYTES


def write_kv(s: Shape) -> Cost:
    """New keys and values into the pool: ``B · N · 2 · g · b`` read and written, slots read."""
    rows = s.batch * s.new_tokens
    moved = rows * kv_token_bytes(s)
    return Cost(moved + rows * 2 * s.num_kv_heads * _INDEX_BYTES, moved, 0)


def write_hidden(s: Shape) -> Cost:
    """New hidden states into the pool: ``B · N · d · b`` read and written, slots read."""
    rows = s.batch * s.new_tokens
    moved = rows * hidden_token_bytes(s)
    return Cost(moved + rows * s.geometry.hidden_units * _INDEX_BYTES, moved, 0)


def write_kv8(s: Shape) -> Cost:
    """New keys and values as codes: ``2 · g · b`` bytes of each read, ``2 · g + 4 · G`` written."""
    rows = s.batch * s.new_tokens
    slots = rows * s.num_kv_heads * _INDEX_BYTES
    return Cost(rows * kv_token_bytes(s) + slots, rows * kv8_token_bytes(s), 0)


def prefill(s: Shape) -> Cost:
    """N query rows over L keys each, the last N causally: ``4 · H · h`` FLOP per visible pair.

    Pairs: ``B · (N · (L - N) + N · (N + 1) / 2)``. K and V are read once; query tiles of a sequence
    share them in the L2 cache.
    """
    old, new = s.context - s.new_tokens, s.new_tokens
    pairs = s.batch * (new * old + new * (new + 1) // 2)
    rows = s.batch * new * s.query_width * s.element_bytes
    cached = s.batch * s.context * kv_token_bytes(s)
    tables = s.table_bytes(s.geometry.kv_units)
    return Cost(rows + cached + tables, rows, 4 * s.query_width * pairs)


def decode_kv(s: Shape, splits: int = 1) -> Cost:
    """One query row per sequence: ``B · L · 2 · g · b`` read, ``4 · B · L · H · h`` FLOP.

    More than one split writes and reads ``B · splits · H · (h + 1)`` float32 of partial results.
    """
    rows = s.batch * s.query_width * s.element_bytes
    cached = s.batch * s.context * kv_token_bytes(s)
    read = rows + cached + s.table_bytes(s.geometry.kv_units)
    flop = 4 * s.batch * s.context * s.query_width
    return Cost(read, rows, flop) + _partials(s, s.head_dim, splits)


def decode_kv8(s: Shape, splits: int = 1) -> Cost:
    """As :func:`decode_kv`, reading codes and scales: ``B · L · (2 · g + 4 · G)`` bytes."""
    rows = s.batch * s.query_width * s.element_bytes
    cached = s.batch * s.context * kv8_token_bytes(s)
    read = rows + cached + s.table_bytes(s.geometry.key_units)
    flop = 4 * s.batch * s.context * s.query_width
    return Cost(read, rows, flop) + _partials(s, s.head_dim, splits)


def decode_hidden(s: Shape, splits: int = 1) -> Cost:
    """Scores of folded queries, then sums: ``2 · B · L · d · b`` read, ``4 · B · L · H · d`` FLOP.

    Between the two passes the softmax weights, ``B · L · H · b``, are written and read. Without
    them this is H FLOP per byte at b = 2: it is bound by memory while a layer has fewer heads than
    the GPU's ridge. :func:`fold` and :func:`unfold` come before and after.
    """
    folded = s.batch * s.num_heads * s.hidden_size * s.element_bytes
    scores = Cost(folded, 0, 2 * s.batch * s.context * s.num_heads * s.hidden_size)
    return scores + _hidden_passes(s, splits)


def decode_projected(s: Shape, splits: int = 1) -> Cost:
    """Keys made anew from hidden states, values absorbed; no K is written to memory.

    Per token ``2 · d · g`` FLOP for its keys (2 · d² where g = d), ``2 · H · h`` for its scores and
    ``2 · H · d`` for the sums. Bytes as :func:`decode_hidden`, with the key weights read once in
    place of folded queries. :func:`unfold` comes after.
    """
    weights = s.hidden_size * s.kv_width * s.element_bytes
    queries = s.batch * s.query_width * s.element_bytes
    per_token = 2 * s.hidden_size * s.kv_width + 2 * s.query_width
    scores = Cost(weights + queries, 0, s.batch * s.context * per_token)
    return scores + _hidden_passes(s, splits)


def _hidden_passes(s: Shape, splits: int) -> Cost:
    """All but the scores: states twice, softmax weights out and in, sums and their partials."""
    tokens = s.batch * s.context
    states = _READS_OF_HIDDEN * tokens * hidden_token_bytes(s)
    tables = _READS_OF_HIDDEN * s.table_bytes(s.geometry.hidden_units)
    weights = tokens * s.num_heads * s.element_bytes
    mixed = s.batch * s.num_heads * s.hidden_size * s.element_bytes
    flop = 2 * tokens * s.num_heads * s.hidden_size
    return Cost(states + tables + weights, weights + mixed, flop) + _partials(
        s, s.hidden_size, splits
    )


def _partials(s: Shape, width: int, splits: int) -> Cost:
    if splits == 1:
        return Cost(0, 0, 0)
    moved = s.batch * splits * s.num_heads * (width + 1) * _FLOAT_BYTES
    return Cost(moved, moved, 0)


def fold(s: Shape) -> Cost:
    """Queries times key weights: ``d · H · h · b`` of weights, ``2 · B · H · h · d`` FLOP."""
    narrow = s.batch * s.query_width * s.element_bytes
    wide = s.batch * s.num_heads * s.hidden_size * s.element_bytes
    return _head_products(s) + Cost(narrow, wide, 0)


def unfold(s: Shape) -> Cost:
    """Sums of hidden states times value weights: as :func:`fold`, from wide to narrow."""
    narrow = s.batch * s.query_width * s.element_bytes
    wide = s.batch * s.num_heads * s.hidden_size * s.element_bytes
    return _head_products(s) + Cost(wide, narrow, 0)


def _head_products(s: Shape) -> Cost:
    weights = s.hidden_size * s.query_width
    return Cost(weights * s.element_bytes, 0, 2 * s.batch * weights)


def gather_hidden(s: Shape) -> Cost:
    """Hidden states out of the pool, in order: ``B · L · d · b`` read and written."""
    moved = s.batch * s.context * hidden_token_bytes(s)
    return Cost(moved + s.table_bytes(s.geometry.hidden_units), moved, 0)


def _reproject(s: Shape) -> Cost:
    """The two products from hidden states to keys and values; weights are read once."""
    tokens, weights = s.batch * s.context, 2 * s.hidden_size * s.kv_width
    read = tokens * hidden_token_bytes(s) + weights * s.element_bytes
    return Cost(read, tokens * kv_token_bytes(s), 2 * tokens * weights)


def promote(s: Shape) -> Cost:
    """All hidden states to keys and values in the pool, once: a copy, two products, another copy.

    ``4 · d · g`` FLOP per token (4 · d² where g = d), ``3 · d · b + 3 · 2 · g · b`` bytes, and the
    weights, ``2 · d · g · b``.
    """
    moved = s.batch * s.context * kv_token_bytes(s)
    into_pool = Cost(moved + s.table_bytes(s.geometry.kv_units), moved, 0)
    return gather_hidden(s) + _reproject(s) + into_pool


def decode_reprojected(s: Shape) -> Cost:
    """What Apt-Serve's paper does in every step: all keys and values made anew, then attended to.

    ``4 · d · g`` FLOP per token, the made keys and values written once and read once.
    """
    return _reproject(s) + decode_kv(s)


def sample(batch: int, vocab_size: int, passes: int = 1) -> Cost:
    """One token per row of float32 logits: ``4 · B · V`` bytes read, ``2 · B · V`` FLOP per pass.

    A row leaves memory once; the passes after the first find it in the L2 cache.
    """
    logits = batch * vocab_size
    return Cost(logits * _FLOAT_BYTES, batch * _INDEX_BYTES, passes * 2 * logits)
