"""Bi-Real Net: Liu, Wu, Luo, Yang, Liu, Cheng, "Bi-Real Net", ECCV 2018.

X̂_i = mean |X_i| sign(X_i), one scale a filter, so that a weight's gradient knows its magnitude:
dL/dX = dL/dX̂ mean |X_i| 1[|X| < 1] (the magnitude-aware gradient of section 3.3). The activation's gradient is the
piecewise polynomial, ``binarize_activation(x, "polynomial")``. The shortcut round each convolution is the network's:
``bonn_resnet18``.
"""

from __future__ import annotations

from torch import Tensor

from bonn_plugin.functional.methods.bases import Bases, filter_mean, sign_with_gradient


def bireal_weight(weight: Tensor) -> Bases:
    """Return sign(X) and mean |X_i| of each filter.

    Args:
        weight: X, (C_out, C_in / groups, kh, kw).
    """
    inside = (weight.detach().abs() < 1).to(weight.dtype)
    return Bases(sign_with_gradient(weight, inside)[None], filter_mean(weight).flatten()[None])


__all__ = ["bireal_weight"]
