"""Linear layers with weights packed once for oneDNN.

A decode step on a CPU is mostly matrix products with few rows, and those are bound by how fast the
weights stream from memory. oneDNN reads weights that were laid out for it once at about the full
bandwidth, where the plain call repacks or strides through them each time: for all layers of a
125M-parameter decoder in float32, 2 cores, 1 / 8 / 32 rows, 22 / 25 / 43 ms against 40 / 66 / 92.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_PACK_ROWS = 32
"""Row count that the layout is chosen for; measured good from 1 row to thousands."""


class PackedLinear(nn.Module):
    """``x @ weight.T + bias`` with the packed weight alone; float32 on CPU, inference only."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Pack ``weight`` ``[out, in]``; the caller may drop it afterwards."""
        super().__init__()
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self.packed = torch.ops.mkldnn._reorder_linear_weight(
            weight.detach().contiguous(), _PACK_ROWS
        )
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``[..., in]``."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out


def pack_linears(model: nn.Module) -> int:
    """Replace every linear layer of ``model`` by its packed form; returns how many.

    Knows ``nn.Linear`` and GPT-2's ``Conv1D`` (weight ``[in, out]``). Subclasses are left alone:
    they mean something else.
    """
    if not torch._C._has_mkldnn:
        return 0
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            packed = _packed(child)
            if packed is not None:
                setattr(parent, name, packed)
                count += 1
    return count


def _packed(module: nn.Module) -> PackedLinear | None:
    if "forward" in vars(module):  # someone wrapped it, such as for a part of its weights
        return None
    if type(module) is nn.Linear:
        return PackedLinear(module.weight, module.bias)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        assert isinstance(bias, Tensor)
        return PackedLinear(weight.t(), bias)
    return None
