"""BNN: Hubara, Courbariaux, Soudry, El-Yaniv, Bengio, "Binarized Neural Networks", NIPS 2016.

Weights and activations are ±1 and nothing is scaled. The gradient of a weight's sign passes as it is (Algorithm 1);
that of an activation's passes where |x| <= 1 (Eq. 4). Weights are clipped to [-1, 1] after each step (Algorithm 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bonn_plugin.functional.methods.bases import Bases, sign_with_gradient


def bnn_weight(weight: Tensor) -> Bases:
    """Return sign(X) with the scale 1; dL/dX = dL/dsign(X).

    Args:
        weight: X, (C_out, C_in / groups, kh, kw).
    """
    one = weight.new_ones(())
    return Bases(sign_with_gradient(weight, one)[None], one.expand(1, 1))


@torch.no_grad()
def clip_weight_(weight: Tensor) -> None:
    """Clip X to [-1, 1] in place: beyond it a weight would move without any effect."""
    weight.clamp_(-1, 1)


__all__ = ["bnn_weight", "clip_weight_"]
