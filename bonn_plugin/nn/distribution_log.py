"""How the latent weights of each binarised layer are spread, as counts that a log can hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

BINS = 128
"""Equal bins over [-REACH, REACH]; with a width of 1/16 their edges are exact in binary."""
REACH = 4.0
"""The outermost edges, in units of mean |X|."""


@dataclass(frozen=True)
class LayerDistribution:
    """The latent weights X of one layer.

    Attributes:
        mean_abs: mean |X| of the layer.
        scale: w̄, what the signs are multiplied by; where filters have scales of their own, their mean.
        counts: of X / mean_abs: below -4, in 128 bins [a, b) over [-4, 4], the last one closed, and above 4.
    """

    mean_abs: float
    scale: float
    counts: tuple[int, ...]


@torch.no_grad()
def count_weights(weight: Tensor) -> tuple[float, tuple[int, ...]]:
    """Return mean |X| and the counts of X / mean |X|, as numpy.histogram gives them in float64.

    Args:
        weight: latent kernel X of a layer, any shape, finite. Where all of it is zero nothing is divided.

    >>> mean_abs, counts = count_weights(torch.tensor([-1.0, 1.0, 1.0, -1.0]))
    >>> mean_abs, counts[49], counts[81], sum(counts)
    (1.0, 2, 2, 4)
    """
    x = weight.detach().flatten().double()
    mean_abs = float(x.abs().mean())
    x = x / (mean_abs or 1.0)
    closed = int((x == REACH).sum())
    # multiplying by a power of two and the floor are exact, so no value can fall into its neighbour's bin
    bins = x.mul_(BINS / (2 * REACH)).floor_().add_(BINS // 2 + 1).clamp_(0, BINS + 1)
    counts = torch.bincount(bins.to(torch.int64), minlength=BINS + 2).tolist()
    counts[-2] += closed
    counts[-1] -= closed
    return mean_abs, tuple(counts)


@torch.no_grad()
def weight_distributions(model: nn.Module) -> dict[str, LayerDistribution]:
    """Return the distribution of each layer in training that has latent weights, by name.

    Such a layer has ``latent_weight()``, and ``weight_scale_mean()`` or the parameter ``modulation``.
    """
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "latent_weight"):
            own = getattr(layer, "weight_scale_mean", None)
            scale = layer.modulation.mean() if own is None else own()
            mean_abs, counts = count_weights(layer.latent_weight())
            found[name] = LayerDistribution(mean_abs, float(scale), counts)
    return found


__all__ = ["BINS", "REACH", "LayerDistribution", "count_weights", "weight_distributions"]
