"""What a recipe would do, without training: layers, windows, and the compression rate to expect.

Or what ``binarize`` alone would do to any network of timm.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from bonn_plugin.errors import ModelError, one_line
from bonn_plugin.models import build_model, build_outline
from bonn_plugin.modifiers import (
    Binarize,
    InputSigns,
    LeftAlone,
    RestModifier,
    Stage,
    WindowConfig,
    left_alone,
    probe_input_signs,
    select_convolutions,
)
from bonn_plugin.nn import ConvGeometry, MethodConv2d, PackedConv2d, SignConv2d, SignInput, replace_module
from bonn_plugin.nn.inputs import image_channels, image_size
from bonn_plugin.nn.operations import Macs, count_macs
from bonn_plugin.recipe import Recipe, parse_recipe
from bonn_plugin.report.ledger import Ledger, ledger
from bonn_plugin.report.merging import Unmerged, unmerged
from bonn_plugin.session import Session

LARGEST_RUN = 200_000_000
"""Parameters of the largest network that ``forecast_model`` builds; of a larger one it sees the shapes alone."""

_MODEL_RECIPE = """version: 1
name: model
model: {{name: {name}, num_classes: {num_classes}}}
data: {{name: imagefolder, root: ., crop: {crop}}}
training: {{epochs: 1, batch_size: 1, optimizer: {{name: sgd, lr: 0.1}}}}
modifiers: [{{type: binarize}}]
"""


@dataclass(frozen=True)
class Layer:
    """A convolution that would be binarised; ``signs`` are what it sees of random images, None if unreached.

    ``outlined`` where the network was not run; ``code`` is what its method reads where that is not the sign.
    """

    name: str
    shape: tuple[int, ...]
    signs: InputSigns | None
    threshold: bool
    real_weights: bool = False
    activation: str | None = None
    outlined: bool = False
    code: str = ""

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
        if self.outlined:
            return "not looked at: the network is too large to run here"
        if self.signs is None:
            return "not reached by the forward pass"
        if self.code:
            return f"read as {self.code}"
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
    """The answer of ``bonn check``.

    ``merged`` are the filters, if any are to be merged, and what is without; ``part`` is the submodule that is to be
    compressed, where that is not all of the network.
    """

    layers: tuple[Layer, ...]
    left_alone: tuple[LeftAlone, ...]
    windows: tuple[Window, ...]
    passed: tuple[Passed, ...]
    parameters: int
    book: Ledger
    before: Macs
    after: Macs
    merged: Unmerged | None
    part: str = ""


def forecast(recipe: Recipe, model: nn.Module, size: tuple[int, int] | None = None) -> Forecast:
    """Prepare and convert ``model`` as the recipe says, and look at what came of it.

    Args:
        recipe: what to do.
        model: in full precision; changed.
        size: (H, W) of the images; None for the recipe's.

    Raises:
        ModelError: recipe and model do not fit.
    """
    height, width = size or (recipe.data.image_size, recipe.data.image_size)
    channels = image_channels(model, recipe.model.args, (height, width))
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(1, channels, height, width, generator=generator)
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
                code=layer.code.words if isinstance(layer, MethodConv2d) and layer.code else "",
            )
        )
    alone = tuple(left_alone(model, example))
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
        getattr(packed, "compressible", ""),
    )


def _passed(session: Session) -> Iterator[Passed]:
    for modifier in session.modifiers:
        if isinstance(modifier, RestModifier):
            yield from (Passed(name, modifier.config.type) for name in modifier.names)


def forecast_model(name: str, num_classes: int, size: tuple[int, int] | None = None) -> Forecast:
    """Look at what ``binarize`` without selectors makes of a network of timm, with random weights.

    A network of more than ``LARGEST_RUN`` parameters is not built: the answer comes from its shapes.

    Args:
        name: in timm's registry.
        num_classes: outputs of the classifier.
        size: (H, W) of the images; None for what timm states.

    Raises:
        ModelBuildError: timm knows no such network.
        ModelError: it has no convolution to binarise, or does not take images of this size.
    """
    outline = build_outline(name, num_classes)
    height, width = size or image_size(outline)
    try:
        chosen = select_convolutions(outline, None)
        if sum(p.numel() for p in outline.parameters()) > LARGEST_RUN:
            return _outlined(outline, chosen, (height, width))
        recipe = parse_recipe(_MODEL_RECIPE.format(name=json.dumps(name), num_classes=num_classes, crop=height))
        return forecast(recipe, build_model(name, num_classes, {}), (height, width))
    except ModelError as error:  # without the place in a recipe that nobody wrote
        plain = error.__cause__ if isinstance(error.__cause__, ModelError) else error
        raise ModelError(f"{name}: {plain}") from error


def _outlined(model: nn.Module, chosen: Mapping[str, nn.Conv2d], size: tuple[int, int]) -> Forecast:
    """Forecast from a model on the meta device; changes it."""
    example = torch.empty(1, image_channels(model, {}, size), *size, device="meta")
    parameters = sum(p.numel() for p in model.parameters())
    try:
        before = sum(count_macs(model, example).values(), Macs())
        layers = []
        with torch.device("meta"):
            for name, conv in chosen.items():
                geometry = ConvGeometry.of(conv)
                layers.append(Layer(name, geometry.weight_shape, None, False, outlined=True))
                replace_module(model, name, PackedConv2d(geometry, bias=conv.bias is not None))
        after = sum(count_macs(model, example).values(), Macs())
    except Exception as error:
        raise ModelError(f"it is too large to run here, and its shapes alone do not do: {one_line(error)}") from error
    return Forecast(tuple(layers), tuple(left_alone(model)), (), (), parameters, ledger(model), before, after, None)
