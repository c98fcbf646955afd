"""``kernel_loss``: the Bayesian kernel loss over the binarised layers (BONN, Eq. 7 and 9)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from bonn_plugin.errors import ModelError
from bonn_plugin.functional import kernel_loss
from bonn_plugin.modifiers.base import (
    Batch,
    Modifier,
    ModifierConfig,
    Path,
    PrepareContext,
    Real,
    Stage,
    WindowConfig,
    register_modifier,
)
from bonn_plugin.modifiers.binarize import method_problem
from bonn_plugin.nn import BimodalPrior, BinaryConv2d


class KernelLossConfig(WindowConfig):
    """Settings of ``kernel_loss``.

    Attributes:
        lambda_: weight of the loss (``lambda`` in a recipe).
        nu: variance of the quantisation error.
        sigma_floor: smallest spread of a filter, in units of the weights.
    """

    type: Literal["kernel_loss"] = "kernel_loss"
    lambda_: Annotated[Real, Field(alias="lambda", gt=0)]
    nu: Annotated[Real, Field(gt=0)]
    sigma_floor: Annotated[Real, Field(gt=0)] = 1e-4

    stage: ClassVar[Stage | None] = Stage.TRAIN
    needs: ClassVar[Mapping[str, str]] = {"binarize": "its loss is over 1-bit kernels"}

    def problems(self, epochs: int, before: tuple[ModifierConfig, ...]) -> Iterator[tuple[Path, str]]:
        """See ``ModifierConfig.problems``."""
        yield from super().problems(epochs, before)
        yield from method_problem(self.type, "bonn", before)


@register_modifier("kernel_loss", KernelLossConfig)
class KernelLoss(Modifier[KernelLossConfig]):
    """Gives each binarised layer its mu and sigma, and adds lambda times the sum of the layers' losses."""

    layers: tuple[BinaryConv2d, ...] = ()

    def prepare(self, model: nn.Module, context: PrepareContext) -> None:
        """Estimate mu and sigma of each filter (Algorithm 1, line 1); see ``Modifier.prepare``."""
        self.layers = tuple(m for m in model.modules() if isinstance(m, BinaryConv2d))
        if not self.layers:
            raise ModelError("kernel_loss finds no binarised layer in the model: binarize it first")
        for layer in self.layers:
            if layer.prior is None:  # a second window has the layers' parameters in common with the first
                layer.prior = BimodalPrior(layer.weight, self.config.sigma_floor)

    def on_epoch_begin(self) -> None:
        """Estimate mu and sigma again when the window opens."""
        if self.active:
            for layer in self.layers:
                assert isinstance(layer.prior, BimodalPrior)
                layer.prior.start(layer.weight)

    def losses(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return ``{"kernel": lambda * sum over layers}``; the only place where lambda is applied."""
        return {"kernel": self.config.lambda_ * model_kernel_loss(self.layers, self.config.nu)}


def model_kernel_loss(layers: tuple[BinaryConv2d, ...], nu: float) -> Tensor:
    """Return the sum over ``layers`` of ``functional.kernel_loss``, a scalar, without lambda."""
    total: Tensor | None = None
    for layer in layers:
        prior = layer.prior
        assert isinstance(prior, BimodalPrior)
        term = kernel_loss(layer.weight, layer.modulation, prior.mu, prior.sigma, nu)
        total = term if total is None else total + term
    assert total is not None
    return total
