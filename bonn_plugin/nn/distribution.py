"""Whether latent weights have two modes (BONN, Fig. 3 and 4), as one number a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bonn_plugin.nn.binary_conv import BinaryConv2d


@torch.no_grad()
def valley(weight: Tensor) -> float:
    """Return the density of |x| near 0 over its density near the mean magnitude.

    The densities are the shares of [0, m/4) and [3m/4, 5m/4), each over its width, with m = mean |x|. Above 1
    the distribution has one mode at zero (a normal one has 1.36); near 0 it has two, at +m and -m.

    Args:
        weight: latent kernel of a layer, any shape.

    >>> valley(torch.tensor([-1.0, -0.9, 1.1, 1.0]))
    0.0
    """
    magnitude = weight.abs().flatten() / weight.abs().mean()
    bottom = (magnitude < 0.25).float().mean() / 0.25
    mode = ((magnitude >= 0.75) & (magnitude < 1.25)).float().mean() / 0.5
    return float(bottom / mode.clamp(min=1e-12))


def latent_valleys(model: nn.Module) -> dict[str, float]:
    """Return ``valley`` of each binarised layer in training, by name."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BinaryConv2d)}
    return {name: valley(layer.weight) for name, layer in layers.items()}
