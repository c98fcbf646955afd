"""What a recipe would do, without training: layers, windows, and the compression rate to expect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from bonn_plugin.modifiers import (
    Binarize,
    InputSigns,
    LeftAlone,
    RestModifier,
    Stage,
    WindowConfig,
    left_alone,
    probe_input_signs,
)
from bonn_plugin.nn import SignConv2d, SignInput
from bonn_plugin.nn.operations import Macs, count_macs
from bonn_plugin.recipe import Recipe
from bonn_plugin.report.ledger import Ledger, ledger
from bonn_plugin.report.merging import Unmerged, unmerged
from bonn_plugin.session import Session


@dataclass(frozen=True)
class Layer:
    """A convolution that would be binarised; ``signs`` are what it sees of random images, None if unreached."""

    name: str
    shape: tuple[int, ...]
    signs: InputSigns | None
    threshold: bool
    real_weights: bool = False
    activation: str | None = None

    @property
    def remark(self) -> str:
        """What there is to say of its input, and of what is not as usual."""
        more = [
            "weights stay real" if self.real_weights else "",
            f"{self.activation} becomes RPReLU" if self.activation else "",
        ]
        return "; ".join(part for part in (self._input, *more) if part)

    @property
    def _input(self) -> str:
        if self.signs is None:
            return "not reached by the forward pass"
        if not self.signs.one_sign:
            return "both signs"
        if self.threshold:
            return "one sign only (a ReLU before it): learned threshold per channel"
        return "WARNING: one sign only and no threshold: it can't learn"


@dataclass(frozen=True)
class Window:
    """A modifier and the epochs in which it is active."""

    type: str
    epochs: range


@dataclass(frozen=True)
class Passed:
    """A layer that stays real, and the pass that takes it after the training."""

    name: str
    type: str


@dataclass(frozen=True)
class Forecast:
    """The answer of ``bonn check``; ``merged`` are the filters, if any are to be merged, and what is without."""

    layers: tuple[Layer, ...]
    left_alone: tuple[LeftAlone, ...]
    windows: tuple[Window, ...]
    passed: tuple[Passed, ...]
    parameters: int
    book: Ledger
    before: Macs
    after: Macs
    merged: Unmerged | None


def forecast(recipe: Recipe, model: nn.Module) -> Forecast:
    """Prepare and convert ``model`` as the recipe says, and look at what came of it.

    Raises:
        ModelError: recipe and model do not fit.
    """
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    generator = torch.Generator().manual_seed(0)
    size = recipe.data.image_size
    example = torch.randn(1, channels, size, size, generator=generator)
    parameters = sum(p.numel() for p in model.parameters())
    before = sum(count_macs(model, example).values(), Macs())
    session = Session(recipe, 1)
    session.prepare(model, example, training=False)
    session.param_groups()  # a learning rate for a role that nothing has is a mistake to tell now
    names = tuple(SignInput.names_in(model))
    signs = probe_input_signs(model, names, example)
    replaced = {n: a for m in session.modifiers if isinstance(m, Binarize) for n, a in m.replaced.items()}
    layers = []
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, SignInput)
        layers.append(
            Layer(
                name,
                layer.geometry.weight_shape,
                signs.get(name),
                layer.threshold is not None,
                isinstance(layer, SignConv2d),
                replaced.get(name),
            )
        )
    alone = tuple(left_alone(model))
    for modifier in session.modifiers:
        modifier.foresee()
    packed = session.forecast(example)
    return Forecast(
        tuple(layers),
        alone,
        tuple(
            Window(c.type, c.window(recipe.training.epochs) if isinstance(c, WindowConfig) else range(session.epochs))
            for c in recipe.modifiers
            if c.stage is not Stage.STORE
        ),
        tuple(
            Passed(name, m.config.type) for m in session.modifiers if isinstance(m, RestModifier) for name in m.names
        ),
        parameters,
        ledger(packed),
        before,
        sum(count_macs(packed, example).values(), Macs()),
        unmerged(packed, example),
    )


def _passed(session: Session) -> Iterator[Passed]:
    for modifier in session.modifiers:
        if isinstance(modifier, RestModifier):
            yield from (Passed(name, modifier.config.type) for name in modifier.names)
