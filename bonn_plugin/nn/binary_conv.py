"""The convolution that trains with 1-bit weights and activations."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bonn_plugin.functional import (
    Ste,
    binarize_activation,
    convolve_signs,
    scale_backward,
    scale_forward,
    sign_weight,
)
from bonn_plugin.nn.geometry import ConvGeometry
from bonn_plugin.nn.merge import FilterMerge
from bonn_plugin.nn.operations import Macs
from bonn_plugin.nn.packed_conv import PackedConv2d

THRESHOLD_BATCHES = 8
"""Training batches from which a learned threshold takes its first value."""


class BinaryConv2d(nn.Module):
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
            the first ``THRESHOLD_BATCHES`` training batches.

    Raises:
        ValueError: the convolution's padding is not zeros, or differs between the two sides.
    """

    binarizes_input = True
    parameter_roles: ClassVar[dict[str, str]] = {
        "weight": "weight",
        "modulation": "modulation",
        "threshold": "threshold",
    }

    threshold_batches: Tensor

    def __init__(self, conv: nn.Conv2d, *, ste: Ste = "clip", bound: float = 1.0, threshold: bool = False) -> None:
        super().__init__()
        self.geometry = ConvGeometry.of(conv)
        self.ste: Ste = ste
        self.bound = bound
        self.weight = conv.weight
        self.bias = conv.bias
        self.prior: nn.Module | None = None
        self.merge: FilterMerge | None = None
        with torch.no_grad():
            self.modulation = nn.Parameter(torch.full_like(conv.weight[0], float(conv.weight.abs().mean())))
        self.threshold: nn.Parameter | None = None
        self._batches_left: int | None = 0
        if threshold:
            self.add_threshold()

    def add_threshold(self) -> None:
        """Give the layer a threshold per input channel, (C_in,), to be set from the first batches."""
        self.threshold = nn.Parameter(self.weight.detach().new_zeros(self.geometry.in_channels))
        self.register_buffer("threshold_batches", self.weight.new_zeros((), dtype=torch.long))
        self._batches_left = THRESHOLD_BATCHES

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C_in, H, W) to (B, C_out, H', W')."""
        if self.threshold is not None:
            if self.training:
                self._follow_input(x)
            x = x - self.threshold.to(x.dtype)[:, None, None]
        scale = self.modulation.detach().mean()
        a = scale_backward(binarize_activation(x, self.ste, self.bound), scale)
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

    @torch.no_grad()
    def _follow_input(self, x: Tensor) -> None:
        assert self.threshold is not None
        if self._batches_left is None:  # read once after a state was loaded: no host sync in each step
            self._batches_left = max(0, THRESHOLD_BATCHES - int(self.threshold_batches))
        if self._batches_left:
            self._batches_left -= 1
            self.threshold_batches += 1
            mean = x.float().mean((0, 2, 3)).to(self.threshold.dtype)
            self.threshold.lerp_(mean, 1 / (THRESHOLD_BATCHES - self._batches_left))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.threshold is not None:
            self._batches_left = None

    @property
    def awaits_threshold(self) -> bool:
        """Whether its threshold has not been set from any batch yet."""
        return self.threshold is not None and int(self.threshold_batches) == 0

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

    @classmethod
    def names_in(cls, model: nn.Module) -> list[str]:
        """Return the names of the modules of this class in ``model``, in order."""
        return [name for name, module in model.named_modules() if isinstance(module, cls)]

    def extra_repr(self) -> str:
        """Return the line that ``print(model)`` shows."""
        g = self.geometry
        return (
            f"{g.in_channels}, {g.out_channels}, kernel_size={g.kernel_size}, stride={g.stride}, "
            f"padding={g.padding}, groups={g.groups}, ste={self.ste}, threshold={self.threshold is not None}"
        )


__all__ = ["THRESHOLD_BATCHES", "BinaryConv2d"]
