"""A control for benchmarks/tables.py: the kernel loss with both modes at zero, a weight decay of learned strength."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bonn_plugin.functional import kernel_loss
from bonn_plugin.modifiers import Modifier, WindowConfig, register_modifier
from bonn_plugin.nn import BimodalPrior, BinaryConv2d


class OneModeConfig(WindowConfig):
    """Settings of ``one_mode``: those of ``kernel_loss``."""

    type: Literal["one_mode"] = "one_mode"
    lambda_: Annotated[float, Field(alias="lambda", gt=0)]
    nu: Annotated[float, Field(gt=0)]


@register_modifier("one_mode", OneModeConfig)
class OneMode(Modifier[OneModeConfig]):
    """``kernel_loss`` with mu fixed at 0, and sigma_i the root mean square of X_i to begin with."""

    def prepare(self, model: nn.Module, context: Any) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, BinaryConv2d)]
        for layer in self.layers:
            prior = BimodalPrior(layer.weight, 1e-4)
            prior.start(layer.weight)
            with torch.no_grad():
                prior.log_sigma.copy_(layer.weight.square().flatten(1).mean(1).sqrt().log())
                prior.mu.zero_()
            prior.mu.requires_grad_(False)
            layer.prior = prior

    def losses(self, batch: Any) -> Mapping[str, Tensor]:
        nu = self.config.nu
        terms = [kernel_loss(m.weight, m.modulation, m.prior.mu, m.prior.sigma, nu) for m in self.layers]
        return {"kernel": self.config.lambda_ * sum(terms)}
