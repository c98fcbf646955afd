"""Half precision: neural-compressor's mixed-precision pass on one layer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from bonn_plugin.errors import ModelError
from bonn_plugin.passes.host import hosted, quantization

_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@torch.no_grad()
def to_half(name: str, layer: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a layer as the framework's 16-bit layer computes with them.

    Args:
        name: the layer's name, for messages.
        layer: a convolution or linear layer; left as it is.
        dtype: float16 or bfloat16.

    Raises:
        ModelError: a value does not fit into the format; the framework is missing or fails.
    """
    with hosted(f"{name}: half precision"):
        api = quantization()
        alone = nn.Sequential(copy.deepcopy(layer))
        wrapper: Any = api.quantize(alone, api.MixedPrecisionConfig(dtype=_NAMES[dtype]))[0]
        if getattr(wrapper, "dtype", None) is not dtype:
            raise ModelError(f"{name}: neural-compressor left the layer in float32")
        weight: Tensor = wrapper.weight.detach().to(wrapper.dtype)
        bias: Tensor | None = None if wrapper.bias is None else wrapper.bias.detach().to(wrapper.dtype)
    for what, value in (("weight", weight), ("bias", bias)):
        if value is not None and not bool(torch.isfinite(value).all()):
            raise ModelError(f"{name}.{what} has values beyond {dtype}: choose bfloat16")
    return weight, bias


__all__ = ["to_half"]
