"""The convolution that trains with 1-bit weights and activations."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from bonn_plugin.functional import Ste, convolve_signs, keep_positive_, scale_backward, scale_forward, sign_weight
from bonn_plugin.nn.merge import FilterMerge
from bonn_plugin.nn.operations import Macs
from bonn_plugin.nn.packed_conv import PackedConv2d
from bonn_plugin.nn.sign_input import THRESHOLD_BATCHES, SignInput


class BinaryConv2d(SignInput):
    """Convolution of sign(x - t) with X̂ = w̄ sign(X) (BONN, Algorithm 1, lines 5-7).

    Computed as w̄ * conv(sign(x - t), sign(X)) + bias: sums of ±1 are exact in float32 whatever the
    order, so that the packed layer gives the same bits. It is no subclass of ``nn.Conv2d``: other
    compression passes take hold of those.

    Args:
        conv: the convolution to replace; its ``weight`` (and ``bias``) become this module's, the
            very same Parameter, so that names and optimizers go on.
        ste: gradient of the activation's sign, ``"clip"`` or ``"polynomial"``.
        bound: half width of the clip.
        threshold: learn a threshold t per input channel, (C_in,). Needed where the input is never
            negative, since its sign would be constant. Its first value is the channel's mean over
            the first ``THRESHOLD_BATCHES`` training batches, those of all processes.

    Raises:
        ValueError: the convolution's padding is not zeros, or differs between the two sides.
    """

    parameter_roles: ClassVar[dict[str, str]] = {
        "weight": "weight",
        "modulation": "modulation",
        "threshold": "threshold",
    }

    def __init__(self, conv: nn.Conv2d, *, ste: Ste = "clip", bound: float = 1.0, threshold: bool = False) -> None:
        super().__init__(conv, ste, bound)
        self.prior: nn.Module | None = None
        self.merge: FilterMerge | None = None
        with torch.no_grad():
            self.modulation = nn.Parameter(torch.full_like(conv.weight[0], float(conv.weight.abs().mean())))
        if threshold:
            self.add_threshold()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C_in, H, W) to (B, C_out, H', W'); one image, (C_in, H, W), as ``nn.Conv2d`` does."""
        if x.dim() == 3:
            return self.forward(x[None])[0]
        scale = self.modulation.detach().mean()
        a = scale_backward(self.input_signs(x), scale)
        s = sign_weight(self.latent_weight(), self.modulation)
        g = self.geometry
        y = scale_forward(convolve_signs(a, s, g.stride, g.padding, g.dilation, g.groups), scale)
        if self.merge is not None:
            y = self.merge.gate(y)
        return y if self.bias is None else y + self.bias[:, None, None]

    def latent_weight(self) -> Tensor:
        """Return the kernel X that is binarised, (C_out, C_in / groups, kh, kw): merging pulls filters together."""
        if self.merge is None:
            return self.weight
        merged: Tensor = self.merge(self.weight)
        return merged

    def after_step(self) -> None:
        """Keep w positive: an element below zero would turn the gradient of its weights round (Eq. 12)."""
        keep_positive_(self.modulation)

    def macs(self, output: Tensor) -> Macs:
        """Count its multiply-accumulates for an ``output`` (B, C_out, H, W): all of them binary."""
        return Macs(binary=output[0].numel() * math.prod(self.geometry.weight_shape[1:]))

    def pack(self) -> PackedConv2d:
        """Return the packed layer that computes the same bits in eval mode."""
        return PackedConv2d.from_dense(
            self.geometry,
            self.latent_weight().detach(),
            self.modulation.detach().mean(),
            None if self.threshold is None else self.threshold.detach().clone(),
            None if self.bias is None else self.bias.detach().clone(),
            self.merge.kept if self.merge is not None and self.merge.zeroed else None,
        )


__all__ = ["THRESHOLD_BATCHES", "BinaryConv2d"]
