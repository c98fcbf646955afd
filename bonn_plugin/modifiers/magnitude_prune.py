"""``magnitude_prune``: small weights of what stays in full precision become zero (torch.ao.pruning)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.ao.pruning.sparsifier.base_sparsifier import BaseSparsifier
from torch.nn.utils import parametrize

from bonn_plugin.errors import ModelError
from bonn_plugin.modifiers.base import (
    ConvertContext,
    Modifier,
    ModifierConfig,
    Path,
    PrepareContext,
    Stage,
    WindowConfig,
    register_modifier,
)
from bonn_plugin.modifiers.layers import real_layers, select_layers
from bonn_plugin.modifiers.select import selector_problem
from bonn_plugin.nn import replace_module
from bonn_plugin.nn.sparse import SparseConv2d, SparseLinear, smaller_sparse


class MagnitudePruneConfig(WindowConfig):
    """Settings of ``magnitude_prune``.

    Attributes:
        sparsity: share of the weights of each layer that is zero at the end of the window.
        targets: selectors of layers; None takes all convolutions and linear layers that stay in full precision.
        schedule: ``cubic`` raises the share from epoch to epoch of the window (Zhu and Gupta 2017, Eq. 1);
            ``once`` takes it all at the window's start.
    """

    type: Literal["magnitude_prune"] = "magnitude_prune"
    sparsity: Annotated[float, Field(gt=0, lt=1)]
    targets: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    schedule: Literal["cubic", "once"] = "cubic"

    stage: ClassVar[Stage | None] = Stage.TRAIN

    def problems(self, epochs: int, before: tuple[ModifierConfig, ...]) -> Iterator[tuple[Path, str]]:
        """See ``ModifierConfig.problems``."""
        yield from super().problems(epochs, before)
        for i, selector in enumerate(self.targets or ()):
            problem = selector_problem(selector)
            if problem:
                yield ("targets", i), problem

    def sparsity_at(self, epoch: int, epochs: int) -> float:
        """Return the share of zeros in ``epoch`` of a training of ``epochs``; the last one of the window has all."""
        window = self.window(epochs)
        if epoch < window.start:
            return 0.0
        if self.schedule == "once":
            return self.sparsity
        left = 1 - min(epoch - window.start + 1, len(window)) / len(window)
        return self.sparsity * (1 - left**3)


class Mask(nn.Module):
    """Multiplies a weight by its mask. Torch's ``FakeSparsity`` leaves the mask out of the state, but asks for it."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """Return the masked weight, in the shape of ``x``."""
        return self.mask * x


class MagnitudeSparsifier(BaseSparsifier):
    """Zeroes the smallest weights of a tensor of any shape.

    ``torch.ao.pruning.WeightNormSparsifier`` takes two dimensions only, and no convolution.
    """

    def __init__(self) -> None:
        super().__init__({"sparsity_level": 0.0})

    def update_mask(self, module: nn.Module, tensor_name: str, **kwargs: Any) -> None:
        """Set the mask of a parametrized tensor: round(sparsity_level * n) zeros, what was zero among them."""
        weight: Tensor = getattr(module, tensor_name)
        mask = parametrizations_of(module, tensor_name)[0].mask
        zeros = round(kwargs["sparsity_level"] * weight.numel())
        kept = torch.ones_like(mask).flatten()
        kept[weight.detach().abs().flatten().argsort(stable=True)[:zeros]] = 0
        mask.copy_(kept.view_as(mask))


def parametrizations_of(module: nn.Module, tensor_name: str) -> Any:
    """Return the list of parametrizations of one tensor."""
    lists: Any = module.parametrizations
    return lists[tensor_name]


@register_modifier("magnitude_prune", MagnitudePruneConfig)
class MagnitudePrune(Modifier[MagnitudePruneConfig]):
    """Masks the layers' weights while they are trained; ``convert`` stores them sparse where that is smaller."""

    layers: Mapping[str, nn.Conv2d | nn.Linear]
    _sparsifier: MagnitudeSparsifier

    def prepare(self, model: nn.Module, context: PrepareContext) -> None:
        """Give each layer a mask; see ``Modifier.prepare``."""
        targets = self.config.targets
        layers = real_layers(model) if targets is None else select_layers(model, targets)
        if not layers:
            raise ModelError("magnitude_prune finds no layer in full precision", ("targets",))
        for name, layer in layers.items():
            if parametrize.is_parametrized(layer):
                raise ModelError(f"the weights of {name} are masked already", ("targets",))
            if round(self.config.sparsity * layer.weight.numel()) >= layer.weight.numel():
                raise ModelError(f"sparsity {self.config.sparsity:g} leaves no weight of {name}", ("sparsity",))
        self.layers = layers
        self._sparsifier = MagnitudeSparsifier()
        sparsifier: Any = self._sparsifier
        sparsifier.prepare(model, [{"tensor_fqn": f"{name}.weight", "parametrization": Mask} for name in layers])

    def on_epoch_begin(self) -> None:
        """Move the masks; after the window they stay."""
        config, clock = self.config, self.clock
        if not self.active or (config.schedule == "once" and clock.epoch > config.start):
            return
        self._prune(config.sparsity_at(clock.epoch, clock.epochs))

    def foresee(self) -> None:
        """Prune as at the end of the window."""
        self._prune(self.config.sparsity)

    def _prune(self, sparsity: float) -> None:
        for group in self._sparsifier.groups:
            group["sparsity_level"] = sparsity
        self._sparsifier.step()

    def metrics(self) -> Mapping[str, Any]:
        """Return the share of zeros over all its layers."""
        weights = [layer.weight.detach() for layer in self.layers.values()]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        return {"sparsity": zeros / sum(weight.numel() for weight in weights)}

    def convert(self, model: nn.Module, context: ConvertContext) -> None:
        """Squash the masks into the weights, and store these sparse where that takes fewer bytes."""
        for name in self.layers:
            layer = model.get_submodule(name)
            _squash(layer)
            sparse = sparse_form(layer)
            if sparse is not None:
                replace_module(model, name, sparse)


@torch.no_grad()
def _squash(layer: Any) -> None:
    """Make a masked layer a plain one, with zeros where its mask has them.

    Not by ``squash_mask``: it takes the weight from the class, which a copy shares with the layer under training.
    """
    weight = layer.weight.detach().clone()
    layer.__class__ = parametrize.type_before_parametrizations(layer)
    del layer.parametrizations
    layer.weight = nn.Parameter(weight)


def sparse_form(layer: nn.Module) -> SparseConv2d | SparseLinear | None:
    """Return the sparse form of a layer; None where it is not smaller, or the layer's forward pass is its own."""
    if type(layer) is nn.Linear:
        return SparseLinear.of(layer) if smaller_sparse(layer.weight) else None
    if type(layer) is nn.Conv2d and smaller_sparse(layer.weight):
        try:
            return SparseConv2d.of(layer)
        except ValueError:  # a padding that ConvGeometry can't express: it stays dense and is counted so
            return None
    return None


__all__ = ["MagnitudePrune", "MagnitudePruneConfig", "MagnitudeSparsifier"]
