"""``projection_loss``: the loss of PCNN (AAAI 2019) over the layers of ``binarize`` with the method ``pcnn``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from bonn_plugin.errors import ModelError
from bonn_plugin.functional.methods import projection_loss
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
from bonn_plugin.nn import ProjectionConv2d


class ProjectionLossConfig(WindowConfig):
    """Settings of ``projection_loss``.

    Attributes:
        lambda_: weight of the loss (``lambda`` in a recipe).
    """

    type: Literal["projection_loss"] = "projection_loss"
    lambda_: Annotated[Real, Field(alias="lambda", gt=0)]

    stage: ClassVar[Stage | None] = Stage.TRAIN
    needs: ClassVar[Mapping[str, str]] = {"binarize": "its loss is over projected kernels"}

    def problems(self, epochs: int, before: tuple[ModifierConfig, ...]) -> Iterator[tuple[Path, str]]:
        """See ``ModifierConfig.problems``."""
        yield from super().problems(epochs, before)
        yield from method_problem(self.type, "pcnn", before)


@register_modifier("projection_loss", ProjectionLossConfig)
class ProjectionLoss(Modifier[ProjectionLossConfig]):
    """Adds lambda times the sum of the layers' projection losses."""

    layers: tuple[ProjectionConv2d, ...] = ()

    def prepare(self, model: nn.Module, context: PrepareContext) -> None:
        """Find the layers; see ``Modifier.prepare``."""
        self.layers = tuple(m for m in model.modules() if isinstance(m, ProjectionConv2d))
        if not self.layers:
            raise ModelError("projection_loss finds no projected layer in the model: binarize it by method pcnn")

    def losses(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return ``{"projection": lambda * sum over layers}``."""
        terms = [projection_loss(layer.weight, layer.projection) for layer in self.layers]
        return {"projection": self.config.lambda_ * sum(terms[1:], terms[0])}
