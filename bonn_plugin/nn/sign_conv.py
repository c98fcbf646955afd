"""The convolution with 1-bit activations and real weights, for the first step of two (ReActNet, ECCV 2020)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bonn_plugin.functional import Ste, sign
from bonn_plugin.nn.geometry import ConvAttributes, ConvGeometry
from bonn_plugin.nn.operations import Macs
from bonn_plugin.nn.sign_input import SignInput
from bonn_plugin.nn.storage import Role, StoredTensor, register_replacement


class SignConv2d(SignInput):
    """conv(sign(x - t), X) + bias with X as it is. Arguments and errors as of ``SignInput``.

    Args:
        conv: the convolution to replace.
        ste: gradient of the activation's sign.
        bound: half width of the clip.
    """

    parameter_roles: ClassVar[dict[str, str]] = {"weight": "weight", "threshold": "threshold"}

    def __init__(self, conv: nn.Conv2d, *, ste: Ste = "clip", bound: float = 1.0) -> None:
        super().__init__(conv, ste, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C_in, H, W) to (B, C_out, H', W'); one image, (C_in, H, W), as ``nn.Conv2d`` does."""
        if x.dim() == 3:
            return self.forward(x[None])[0]
        y = self.geometry.convolve(self.input_signs(x), self.weight)
        return y if self.bias is None else y + self.bias[:, None, None]

    def macs(self, output: Tensor) -> Macs:
        """Count its multiply-accumulates for an ``output`` (B, C_out, H, W): real ones."""
        return Macs(real=output[0].numel() * math.prod(self.geometry.weight_shape[1:]))

    def pack(self) -> StoredSignConv2d:
        """Return the layer that a checkpoint stores; it computes the same bits in eval mode."""
        stored = StoredSignConv2d(self.geometry, threshold=self.threshold is not None, bias=self.bias is not None)
        stored.to(self.weight.device)
        with torch.no_grad():
            stored.weight.copy_(self.weight)
            if stored.threshold is not None and self.threshold is not None:
                stored.threshold.copy_(self.threshold)
            if stored.bias is not None and self.bias is not None:
                stored.bias.copy_(self.bias)
        return stored


@register_replacement("sign_conv2d")
class StoredSignConv2d(ConvAttributes, nn.Module):
    """conv(sign(x - t), X) + bias in a checkpoint: ``weight`` float32, (C_out, C_in / groups, kh, kw).

    Args:
        geometry: the convolution's shape.
        threshold: whether there is a threshold t per input channel.
        bias: whether there is a bias.
        dtype: of all tensors.
    """

    binarizes_input = True
    kind: str
    weight: Tensor
    threshold: Tensor | None
    bias: Tensor | None

    def __init__(
        self, geometry: ConvGeometry, *, threshold: bool = False, bias: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.register_buffer("weight", torch.zeros(geometry.weight_shape, dtype=dtype))
        self.register_buffer("threshold", torch.zeros(geometry.in_channels, dtype=dtype) if threshold else None)
        self.register_buffer("bias", torch.zeros(geometry.out_channels, dtype=dtype) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C_in, H, W) to (B, C_out, H', W')."""
        if self.threshold is not None:
            x = x - self.threshold.to(x.dtype)[:, None, None]
        y = self.geometry.convolve(sign(x), self.weight)
        return y if self.bias is None else y + self.bias[:, None, None]

    def macs(self, output: Tensor) -> Macs:
        """Count its multiply-accumulates for an ``output`` (B, C_out, H, W): real ones."""
        return Macs(real=output[0].numel() * math.prod(self.geometry.weight_shape[1:]))

    def stored_tensors(self) -> Mapping[str, StoredTensor]:
        """Declare the weights, and threshold and bias where there are any."""
        own = {"weight": StoredTensor.real(self.weight, Role.REAL_WEIGHT)}
        if self.threshold is not None:
            own["threshold"] = StoredTensor.real(self.threshold, Role.THRESHOLD, added=True)
        if self.bias is not None:
            own["bias"] = StoredTensor.real(self.bias, Role.REAL_WEIGHT)
        return own

    def spec(self) -> dict[str, Any]:
        """Return the JSON-ready arguments of ``from_spec``."""
        return {
            **self.geometry.to_dict(),
            "threshold": self.threshold is not None,
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> StoredSignConv2d:
        """Build the layer with empty tensors. Raises ValueError on a spec that makes no sense."""
        return cls(ConvGeometry.from_dict(spec), threshold=bool(spec.get("threshold")), bias=bool(spec.get("bias")))

    def extra_repr(self) -> str:
        """Return the line that ``print(model)`` shows."""
        return f"{self.geometry}, threshold={self.threshold is not None}"


__all__ = ["SignConv2d", "StoredSignConv2d"]
