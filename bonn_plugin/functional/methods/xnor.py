"""XNOR-Net and BWN: Rastegari, Ordonez, Redmon, Farhadi, "XNOR-Net", ECCV 2016.

X_i ~ alpha_i sign(X_i) with alpha_i = mean |X_i| of each filter (Eq. 6); the gradient is that of section 3.1,
dL/dX = dL/dX̂ (1/n + 1[|X| <= 1] alpha). BWN leaves the activations real; XNOR-Net takes their signs, and K, the mean
of |x| over each window (Eq. 11).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bonn_plugin.functional.methods.bases import Bases, filter_mean, sign_with_gradient


def xnor_weight(weight: Tensor) -> Bases:
    """Return sign(X) and alpha, one number a filter.

    Args:
        weight: X, (C_out, C_in / groups, kh, kw).
    """
    alpha = filter_mean(weight)
    inside = (weight.detach().abs() <= 1).to(weight.dtype)
    factor = inside + 1 / (alpha * weight[0].numel())
    return Bases(sign_with_gradient(weight, factor)[None], alpha.flatten()[None])


@torch.no_grad()
def xnor_input_scale(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """Return K, the mean of |x| over the window and the channels that an output sees; a padded position counts as 0.

    Args:
        x: (B, C_in, H, W).
        kernel_size: (height, width), as are ``stride``, ``padding`` and ``dilation``.
        stride: of the convolution.
        padding: zeros on both sides.
        dilation: spacing of the kernel's elements.
        groups: of the convolution.

    Returns:
        (B, groups, H', W'), without gradient: the paper has none through K.
    """
    mean = x.abs().reshape(len(x), groups, -1, *x.shape[2:]).mean(2)
    box = x.new_full((groups, 1, *kernel_size), 1 / (kernel_size[0] * kernel_size[1]))
    return F.conv2d(mean, box, None, tuple(stride), tuple(padding), tuple(dilation), groups)


__all__ = ["xnor_input_scale", "xnor_weight"]
