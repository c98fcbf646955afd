"""ReActNet: Liu, Shen, Savvides, Cheng, "ReActNet", ECCV 2020.

Weights are mean |X_i| sign(X_i), one scale a filter, and dL/dX = dL/dX̂ 1[|X| <= 1]. RSign is the sign with a learned
threshold a channel, with Bi-Real Net's polynomial gradient; RPReLU is ``nn.RPReLU``.
"""

from __future__ import annotations

from torch import Tensor

from bonn_plugin.functional.methods.bases import Bases, filter_mean, sign_with_gradient


def reactnet_weight(weight: Tensor) -> Bases:
    """Return sign(X) and mean |X_i| of each filter.

    Args:
        weight: X, (C_out, C_in / groups, kh, kw).
    """
    scale = filter_mean(weight)
    inside = (weight.detach().abs() <= 1).to(weight.dtype)
    return Bases(sign_with_gradient(weight, inside / scale)[None], scale.flatten()[None])


__all__ = ["reactnet_weight"]
