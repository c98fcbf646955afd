"""The training convolution of the methods beside BONN: they differ by a rule for weights and a code for inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from bonn_plugin.functional import Ste, convolve_signs, keep_positive_
from bonn_plugin.functional.methods import Bases, clip_weight_, pcnn_weight
from bonn_plugin.nn.bases_conv import PackedBasesConv2d, sum_of_bases
from bonn_plugin.nn.input_code import InputCode
from bonn_plugin.nn.operations import Macs
from bonn_plugin.nn.packed_conv import PackedConv2d, by_channel, input_scale_macs, scale_by_input
from bonn_plugin.nn.sign_input import SignInput

WeightRule = Callable[[Tensor], Bases]


class MethodConv2d(SignInput):
    """sum over m, n of beta_n alpha_m conv(A_n(x), B_m(X)) + bias, computed as the packed layer computes it.

    Args:
        conv: the convolution to replace; its ``weight`` (and ``bias``) become this module's.
        rule: makes signs and scales of the weight, with the method's gradients.
        code: what is read of the input; None for its sign.
        ste: gradient of the sign.
        bound: half width of the clip.
        input_scale: multiply by K, the mean of |x - t| over the window of each output (XNOR-Net).
        clip: keep the weights within [-1, 1] (BNN).

    Raises:
        ValueError: the convolution's padding is not zeros, or differs between the two sides.
    """

    parameter_roles: ClassVar[dict[str, str]] = {"weight": "weight", "threshold": "threshold"}

    def __init__(
        self,
        conv: nn.Conv2d,
        rule: WeightRule,
        code: InputCode | None = None,
        *,
        ste: Ste = "clip",
        bound: float = 1.0,
        input_scale: bool = False,
        clip: bool = False,
    ) -> None:
        super().__init__(conv, ste, bound)
        self.rule = rule
        self.code = None if code is None else code.to(conv.weight.device)
        self.input_scale = input_scale
        self.clip = clip
        self.takes_signs = code is None
        self.binarizes_input = code is None or code.bends
        if clip:
            clip_weight_(self.weight)

    def bases(self) -> Bases:
        """Return signs and scales of the weight."""
        return self.rule(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C_in, H, W) to (B, C_out, H', W'); one image, (C_in, H, W), as ``nn.Conv2d`` does."""
        if x.dim() == 3:
            return self.forward(x[None])[0]
        bases = self.bases()
        if self.code is not None:
            y = sum_of_bases(self.geometry, self.code, x, list(bases.signs.to(x.dtype)), bases.scale)
        else:
            g = self.geometry
            signs = bases.signs[0].to(x.dtype)
            y = convolve_signs(self.input_signs(x), signs, g.stride, g.padding, g.dilation, g.groups)
            scale = bases.scale[0]
            y = (y.to(scale.dtype) * by_channel(scale)).to(y.dtype)
            if self.input_scale:
                shifted = x if self.threshold is None else x - self.threshold.to(x.dtype)[:, None, None]
                y = scale_by_input(y, shifted, self.geometry)
        return y if self.bias is None else y + self.bias[:, None, None]

    def latent_weight(self) -> Tensor:
        """Return the kernel X that is binarised, (C_out, C_in / groups, kh, kw)."""
        return self.weight

    @torch.no_grad()
    def weight_scale_mean(self) -> float:
        """Return the mean scale of its filters, summed over the bases."""
        return float(self.bases().scale.sum(0).mean())

    @torch.no_grad()
    def after_step(self) -> None:
        """Do what the method does once the optimizer has moved."""
        if self.clip:
            clip_weight_(self.weight)

    def macs(self, output: Tensor) -> Macs:
        """Count its operations for an ``output`` (B, C_out, H, W), over all bases."""
        count = output[0].numel() * math.prod(self.geometry.weight_shape[1:])
        with torch.no_grad():
            count *= len(self.bases().signs)
        macs = Macs(binary=count) if self.code is None else self.code.macs(count)
        return macs + input_scale_macs(self.geometry, output) if self.input_scale else macs

    @torch.no_grad()
    def pack(self) -> PackedConv2d | PackedBasesConv2d:
        """Return the packed layer that computes the same bits in eval mode."""
        bases = self.bases()
        bias = None if self.bias is None else self.bias.detach().clone()
        if self.code is not None:
            return PackedBasesConv2d.from_bases(self.geometry, bases, self.code, bias)
        scale = bases.scale[0]
        return PackedConv2d.from_dense(
            self.geometry,
            bases.signs[0],
            scale[0].clone() if len(scale) == 1 else scale.clone(),
            None if self.threshold is None else self.threshold.detach().clone(),
            bias,
            input_scale=self.input_scale,
        )

    def extra_repr(self) -> str:
        """Return the line that ``print(model)`` shows."""
        return (
            f"{self.geometry}, rule={getattr(self.rule, '__name__', 'bases')}, threshold={self.threshold is not None}"
        )


class ProjectionConv2d(MethodConv2d):
    """PCNN's: the weights are projected by a learned plane, ``projection`` (kh, kw), that begins at 1.

    Arguments and errors as of ``MethodConv2d``.
    """

    parameter_roles: ClassVar[dict[str, str]] = {
        "weight": "weight",
        "threshold": "threshold",
        "projection": "modulation",
    }

    def __init__(self, conv: nn.Conv2d, *, ste: Ste = "clip", bound: float = 1.0) -> None:
        super().__init__(conv, self._project, ste=ste, bound=bound)
        self.projection = nn.Parameter(conv.weight.detach().new_ones(conv.kernel_size))

    def after_step(self) -> None:
        """Keep the plane positive, as w of ``BinaryConv2d``: its gradients are those of Eq. 12 with the plane for w."""
        super().after_step()
        keep_positive_(self.projection)

    def _project(self, weight: Tensor) -> Bases:
        return pcnn_weight(weight, self.projection)


__all__ = ["MethodConv2d", "ProjectionConv2d", "WeightRule"]
