"""``binarize``: convolutions become 1-bit, in training and in the checkpoint (BONN, Algorithm 1, lines 5-7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from bonn_plugin.errors import ModelError
from bonn_plugin.functional import Ste
from bonn_plugin.modifiers.activations import following_activations
from bonn_plugin.modifiers.base import (
    ConvertContext,
    Modifier,
    ModifierConfig,
    Path,
    PrepareContext,
    Real,
    Stage,
    register_modifier,
)
from bonn_plugin.modifiers.methods import METHODS, OF_SOME, Method, MethodName
from bonn_plugin.modifiers.select import select_convolutions, selector_problem
from bonn_plugin.nn import BinaryConv2d, MethodConv2d, RPReLU, SignConv2d, SignInput, replace_module
from bonn_plugin.nn.modes import run_once

Threshold = Literal["auto", "always", "never"]


class BinarizeConfig(ModifierConfig):
    """Settings of ``binarize``.

    Attributes:
        targets: selectors; None takes every plain convolution larger than 1x1 but the first.
        expect: how many convolutions must match.
        method: ``bonn``, or a system that the papers compare with; it may set other defaults for the keys below.
        ste: gradient of the activation's sign.
        bound: half width of the clip gradient.
        threshold: a learned threshold per input channel: ``auto`` where a probe sees one sign only.
        threshold_init: its first value: the channel's ``mean`` in the first batches, or ``zero`` (ReActNet's RSign).
        weights: ``real`` binarises the activations alone: the first step of training in two.
        activation: ``rprelu`` puts ReActNet's RPReLU in the place of the activation behind each convolution.
        input_scale: ``xnor``: multiply outputs by the mean of |x| over their window.
        activation_bits: ``dorefa``: k.
        delta: ``tbn``: edge of the ternary activation, as a share of the mean of |x|.
        weight_bases: ``abc``: M.
        activation_bases: ``abc``: N.
    """

    type: Literal["binarize"] = "binarize"
    targets: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    expect: Annotated[int, Field(ge=1)] | None = None
    method: MethodName = "bonn"
    ste: Ste = "clip"
    bound: Annotated[Real, Field(gt=0)] = 1.0
    threshold: Threshold = "auto"
    threshold_init: Literal["mean", "zero"] = "mean"
    weights: Literal["binary", "real"] = "binary"
    activation: Literal["keep", "rprelu"] = "keep"
    input_scale: bool = True
    activation_bits: Annotated[int, Field(ge=1, le=8)] = 4
    delta: Annotated[Real, Field(ge=0)] = 0.4
    weight_bases: Annotated[int, Field(ge=1, le=8)] = 1
    activation_bases: Annotated[int, Field(ge=1, le=8)] = 1

    stage: ClassVar[Stage | None] = Stage.BINARIZE

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, said: Any) -> Any:
        name = said.get("method", "bonn") if isinstance(said, Mapping) else None
        method = METHODS.get(name) if isinstance(name, str) else None  # type: ignore[call-overload]
        if method is None:
            return said
        off = {"threshold_init"} if said.get("threshold") == "never" else set()
        return {**{key: value for key, value in method.preset.items() if key not in off}, **said}

    @property
    def way(self) -> Method:
        """What ``method`` names."""
        return METHODS[self.method]

    def problems(self, epochs: int, before: tuple[ModifierConfig, ...]) -> Iterator[tuple[Path, str]]:
        """See ``ModifierConfig.problems``."""
        for key in sorted(self.model_fields_set & (OF_SOME - self.way.keys)):
            have = ", ".join(name for name, method in METHODS.items() if key in method.keys)
            yield (key,), f"{key!r} has no meaning for method {self.method!r}: it is of {have}"
        for i, selector in enumerate(self.targets or ()):
            problem = selector_problem(selector)
            if problem:
                yield ("targets", i), problem
        if self.ste == "polynomial" and self.bound != 1.0:
            own = "" if "ste" not in self.way.preset else f"; method {self.method!r} sets it: ste: clip takes a bound"
            yield ("bound",), f"the polynomial gradient has a fixed bound of 1{own}"
        if self.threshold == "never" and "threshold_init" in self.model_fields_set:
            yield ("threshold_init",), "there is no threshold to give a first value: threshold is 'never'"


def method_problem(who: str, method: str, before: tuple[ModifierConfig, ...]) -> Iterator[tuple[Path, str]]:
    """Yield what is wrong where ``who`` is for layers of ``method`` and no ``binarize`` before it makes such."""
    made = [config.method for config in before if isinstance(config, BinarizeConfig)]
    if made and method not in made:
        yield ("type",), f"{who} is for binarize with method {method!r}; the one before it has {made[-1]!r}"


@dataclass(frozen=True)
class InputSigns:
    """What one binarised convolution saw in a probe: the smallest and the largest input."""

    minimum: float
    maximum: float

    @property
    def one_sign(self) -> bool:
        """Whether the sign of the input is constant, so that nothing can be learned through it."""
        return self.minimum >= 0 or self.maximum < 0


@register_modifier("binarize", BinarizeConfig)
class Binarize(Modifier[BinarizeConfig]):
    """Replaces convolutions by ``BinaryConv2d`` (or ``SignConv2d``) in ``prepare`` and packs them in ``convert``.

    Attributes:
        names: the convolutions.
        layers: what they became for the training.
        replaced: the activations that became an RPReLU, by the convolution they follow.
    """

    names: tuple[str, ...] = ()
    layers: tuple[SignInput, ...] = ()
    replaced: Mapping[str, str] = MappingProxyType({})

    def prepare(self, model: nn.Module, context: PrepareContext) -> None:
        """Swap the selected convolutions; see ``Modifier.prepare``."""
        config = self.config
        convolutions = select_convolutions(model, config.targets, config.expect, context.example_input)
        if config.threshold == "auto" and config.way.takes_signs and context.example_input is None:
            raise ModelError(
                "threshold 'auto' needs a look at the activations: pass example_inputs, or set 'always' or 'never'",
                ("threshold",),
            )
        self.names = tuple(convolutions)
        if config.activation == "rprelu":
            self._replace_activations(model, context)
        for name, conv in convolutions.items():
            real = config.weights == "real"
            made = SignConv2d(conv, ste=config.ste, bound=config.bound) if real else config.way.make(conv, config)
            replace_module(model, name, made)
            self.layers = (*self.layers, made)
        if config.threshold == "never" or not config.way.takes_signs:
            return
        signs = {}
        if config.threshold == "auto":
            assert context.example_input is not None
            signs = probe_input_signs(model, self.names, context.example_input)
        for name in self.names:
            if config.threshold == "always" or name not in signs or signs[name].one_sign:
                layer = model.get_submodule(name)
                assert isinstance(layer, SignInput)
                layer.add_threshold(from_input=config.threshold_init == "mean")

    def _replace_activations(self, model: nn.Module, context: PrepareContext) -> None:
        if context.example_input is None:
            raise ModelError("activation 'rprelu' needs a look at the network: pass example_inputs", ("activation",))
        following = following_activations(model, self.names, context.example_input)
        self.replaced = {name: found.name for name, found in following.items()}
        for found in dict.fromkeys(following.values()):
            replace_module(model, found.name, RPReLU.like(model.get_submodule(found.name), found.channels))

    def on_after_optimizer_step(self) -> None:
        """Let each layer do what its method does after a step."""
        for layer in self.layers:
            layer.after_step()

    def convert(self, model: nn.Module, context: ConvertContext) -> None:
        """Replace each layer by the one that is stored."""
        for name in self.names:
            layer = model.get_submodule(name)
            assert isinstance(layer, (BinaryConv2d, SignConv2d, MethodConv2d))
            replace_module(model, name, layer.pack())


def probe_input_signs(model: nn.Module, names: tuple[str, ...], example: Tensor) -> dict[str, InputSigns]:
    """Return what reaches the named modules when ``model`` sees ``example``, (B, C, H, W), in eval mode.

    A module that the forward pass does not reach is left out.

    Raises:
        ModelError: the model does not take the example.
    """
    signs: dict[str, InputSigns] = {}

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen = InputSigns(float(args[0].min()), float(args[0].max()))
            if name in signs:  # a convolution may be called more than once
                seen = InputSigns(min(seen.minimum, signs[name].minimum), max(seen.maximum, signs[name].maximum))
            signs[name] = seen

        return model.get_submodule(name).register_forward_pre_hook(hook)

    handles = [watch(name) for name in names]
    try:
        run_once(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return signs
