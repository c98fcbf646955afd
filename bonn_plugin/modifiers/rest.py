"""What the passes on the real-valued rest have in common: their targets, their place in the list, their order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Annotated, ClassVar, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bonn_plugin.errors import ModelError
from bonn_plugin.modifiers.base import ConvertContext, Modifier, ModifierConfig, Path, PrepareContext, Stage
from bonn_plugin.modifiers.select import match_names, selector_problem
from bonn_plugin.nn import BINARISED, ConvGeometry
from bonn_plugin.passes import require_host

_CLAIM = "_bonn_pass"
"""Attribute of a layer: the type of the modifier that is going to take it."""


class RestConfig(ModifierConfig):
    """Settings of a pass on what stays real.

    Attributes:
        targets: selectors; None takes every convolution and linear layer that stays real, that the pass
            supports, and that no pass before it in the list takes.
        expect: how many layers must match.
    """

    targets: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    expect: Annotated[int, Field(ge=1)] | None = None

    stage: ClassVar[Stage | None] = Stage.STORE
    needs: ClassVar[Mapping[str, str]] = MappingProxyType({"binarize": "it works on what stays real after that"})

    def problems(self, epochs: int, before: tuple[ModifierConfig, ...]) -> Iterator[tuple[Path, str]]:
        """See ``ModifierConfig.problems``."""
        for i, selector in enumerate(self.targets or ()):
            problem = selector_problem(selector)
            if problem:
                yield ("targets", i), problem


C = TypeVar("C", bound=RestConfig)


class RestModifier(Modifier[C]):
    """A pass of neural-compressor on layers that stay real, after the training.

    The layers are chosen in ``prepare``, so that a mistake shows before the training and not after it.

    Attributes:
        takes: which layers it supports.
    """

    exact = False
    takes: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d, nn.Linear)
    names: tuple[str, ...] = ()

    def prepare(self, model: nn.Module, context: PrepareContext) -> None:
        """Choose the layers; see ``Modifier.prepare``."""
        require_host(self.config.type)
        self.names = select_real(model, self.config, self.takes)
        for name in self.names:
            setattr(model.get_submodule(name), _CLAIM, self.config.type)

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the layers to convert by name.

        Raises:
            ModelError: another modifier changed one since ``prepare``.
        """
        found = {name: model.get_submodule(name) for name in self.names}
        for name, module in found.items():
            reason = _unfit(module, self.takes)
            if reason is not None:
                raise ModelError(f"{name} can't be taken by {self.config.type}: {reason}", ("targets",))
        return found


def select_real(model: nn.Module, config: RestConfig, takes: tuple[type[nn.Module], ...]) -> tuple[str, ...]:
    """Return the names of the layers that a pass takes, in the model's order.

    Args:
        model: binarised; nothing is changed.
        config: the pass's settings.
        takes: which layers it supports.

    Raises:
        ModelError: a selector matches nothing, a binarised layer, one that the pass can't take, or one that
            another pass takes; the count is off.
    """
    who = config.type
    modules = {name: module for name, module in model.named_modules() if name}
    real = [name for name, module in modules.items() if isinstance(module, (nn.Conv2d, nn.Linear))]

    def refusal(name: str) -> str:
        return f"{name} can't be taken by {who}: {_unfit(modules[name], takes)}"

    if config.targets is None:
        chosen = [n for n in real if _unfit(modules[n], takes) is None and not hasattr(modules[n], _CLAIM)]
        if not chosen:
            kinds = " or ".join(kind.__name__ for kind in takes)
            raise ModelError(f"{who} finds nothing to take: no {kinds} stays real that no other pass takes")
    else:
        taken: set[str] = set()
        for i, selector in enumerate(config.targets):
            try:
                matched = match_names(modules, selector, real, "real layer", refusal)
            except ModelError as error:
                raise ModelError(str(error), ("targets", i)) from None
            for name in matched:
                reason = _unfit(modules[name], takes)
                if reason is not None:
                    raise ModelError(f"{name} can't be taken by {who}: {reason}", ("targets", i))
                other = getattr(modules[name], _CLAIM, None)
                if other is not None:
                    raise ModelError(
                        f"{name} is taken by an earlier {other}: one pass a layer, take it out of one of them",
                        ("targets", i),
                    )
            taken.update(matched)
        chosen = [name for name in real if name in taken]
    if config.expect is not None and len(chosen) != config.expect:
        raise ModelError(
            f"expected {config.expect} layers, the selectors match {len(chosen)}: {', '.join(chosen[:4])}"
            + (", ..." if len(chosen) > 4 else ""),
            ("expect",),
        )
    return tuple(chosen)


def _unfit(module: nn.Module, takes: tuple[type[nn.Module], ...]) -> str | None:
    """Why a pass can't take a module; None if it can."""
    if isinstance(module, BINARISED):
        return "it is binarised"
    if parametrize.is_parametrized(module):
        return "its weights are masked by a pruning, which stores them itself"
    if not isinstance(module, takes):
        kinds = " and ".join(kind.__name__ for kind in takes)
        return f"it is a {type(module).__name__}, and the pass supports {kinds} alone"
    if type(module) not in takes:
        return f"it is a {type(module).__name__}, whose forward pass is its own"
    if isinstance(module, nn.Conv2d):
        try:
            ConvGeometry.of(module)
        except ValueError as error:
            return str(error)
    return None


@torch.no_grad()
def calibration_batches(context: ConvertContext, who: str, count: int, like: nn.Module) -> list[Tensor]:
    """Return the first ``count`` batches of calibration images, or what there is, on the model's device.

    Raises:
        ModelError: there are none, or they hold values that are not finite.
    """
    if context.calibration is None:
        raise ModelError(
            f"{who} chooses its scales by what the layers see: give it images, "
            "session.convert(calibration=...), a function that returns batches (B, C, H, W) of training images"
        )
    parameter = next(like.parameters(), None)
    batches = list(islice(context.calibration(), count))
    if not batches:
        raise ModelError(f"{who}: session.convert(calibration=...) gave no batch of images")
    for i, images in enumerate(batches):
        if not bool(torch.isfinite(images).all()):
            raise ModelError(f"{who}: batch {i + 1} of the calibration images has values that are not finite")
    return [images if parameter is None else images.to(parameter) for images in batches]


__all__ = ["RestConfig", "RestModifier", "calibration_batches", "select_real"]
