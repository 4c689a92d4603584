"""Shapes of models, from their published configurations."""

from __future__ import annotations

from dataclasses import dataclass

from aptserve_scheduler.sim.cost.hardware import BYTES_PER_NUMBER


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder. Widths count numbers, of two bytes each."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    vocab_size: int
    gated: bool
    """Whether the first product of the MLP is twice as wide (SwiGLU)."""
    rotary: bool
    """Whether keys depend on their position, so that their weights cannot be folded."""
    tied: bool = False
    """Whether the output head is the embedding."""
    num_positions: int = 0
    """Rows of a learned position embedding."""
    num_biases: int = 0
    """Numbers of a layer that are no matrix and no norm weight."""
    tensor_parallel: int = 1
    """GPUs that the model is usually spread over."""

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_width(self) -> int:
        """Numbers of one token's keys (or values) in a layer."""
        return self.num_kv_heads * self.head_size

    @property
    def up_width(self) -> int:
        """Outputs of the MLP's first product."""
        return self.ffn_size * (2 if self.gated else 1)

    @property
    def weight_bytes(self) -> int:
        """All weights in 16 bits."""
        d = self.hidden_size
        attention = 2 * d * d + 2 * d * self.kv_width
        mlp = d * (self.up_width + self.ffn_size)
        layer = attention + mlp + 2 * d + self.num_biases
        embeddings = d * (self.vocab_size * (1 if self.tied else 2) + self.num_positions)
        return BYTES_PER_NUMBER * (self.num_layers * layer + embeddings + d)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of a token in all layers."""
        return BYTES_PER_NUMBER * 2 * self.kv_width * self.num_layers

    @property
    def hidden_bytes_per_token(self) -> int:
        """Layer inputs of a token in all layers."""
        return BYTES_PER_NUMBER * self.hidden_size * self.num_layers


def _opt(name: str, layers: int, width: int, heads: int, ranks: int = 1) -> ModelShape:
    return ModelShape(
        name=name,
        num_layers=layers,
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=heads,
        ffn_size=4 * width,
        vocab_size=50272,
        gated=False,
        rotary=False,
        tied=True,
        num_positions=2050,
        num_biases=11 * width,  # four of attention, five of the MLP, two of the norms
        tensor_parallel=ranks,
    )


def _llama(
    name: str, layers: int, width: int, heads: int, kv_heads: int, ffn: int, vocab: int
) -> ModelShape:
    return ModelShape(name, layers, width, heads, kv_heads, ffn, vocab, gated=True, rotary=True)


MODELS: dict[str, ModelShape] = {
    model.name: model
    for model in (
        _opt("opt-125m", 12, 768, 12),
        _opt("opt-13b", 40, 5120, 40),
        _opt("opt-30b", 48, 7168, 56, ranks=2),
        _opt("opt-66b", 64, 9216, 72, ranks=4),
        _llama("llama-2-7b", 32, 4096, 32, 32, 11008, 32000),
        _llama("llama-2-13b", 40, 5120, 40, 40, 13824, 32000),
        _llama("llama-3-8b", 32, 4096, 32, 8, 14336, 128256),
        _llama("qwen2.5-14b", 48, 5120, 40, 8, 13824, 152064),
    )
}
