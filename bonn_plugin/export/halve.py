"""The torch model whose real weights are rounded to float16, as an export with ``half`` stores them."""

from __future__ import annotations

import copy

import torch
from torch import nn

from bonn_plugin.errors import ExportError


@torch.no_grad()
def with_half_weights(model: nn.Module) -> nn.Module:
    """Return a copy in which weights of real convolutions and linear layers are float16 values in float32.

    Raises:
        ExportError: a weight is too large for float16.
    """
    rounded = copy.deepcopy(model)
    for name, module in rounded.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            half = module.weight.half().float()
            if not bool(half.isfinite().all()):
                raise ExportError(f"{name}.weight has values beyond float16: export without --half")
            module.weight.copy_(half)
    return rounded


__all__ = ["with_half_weights"]
