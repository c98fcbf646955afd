"""Which activation belongs to which binarised convolution, found by looking at one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bonn_plugin.errors import ModelError
from bonn_plugin.nn.modes import run_once

_ACTIVATIONS = frozenset(
    (
        *("ReLU", "ReLU6", "PReLU", "LeakyReLU", "ELU", "CELU", "SELU", "Hardtanh", "Softplus"),
        *("GELU", "GELUTanh", "QuickGELU", "SiLU", "Swish", "Mish", "HardMish", "HardMishMe"),
        *("Hardswish", "HardSwish", "HardswishMe"),
    )
)
"""Classes of torch and timm, by name: timm has its own forms of torch's. Gates (sigmoids) are not among them."""


@dataclass(frozen=True)
class Following:
    """An activation that follows a convolution.

    Attributes:
        name: of the activation.
        channels: C of its input.
    """

    name: str
    channels: int


def following_activations(model: nn.Module, convolutions: Sequence[str], example: Tensor) -> dict[str, Following]:
    """Return for each of ``convolutions`` the activation that follows it.

    That is the first activation module that runs after it on maps of the shape of its output, (B, C, H, W), before
    the next of ``convolutions`` runs. A shortcut's convolution and norm may run between.

    Args:
        model: run once in eval mode.
        convolutions: names, in any order.
        example: (B, C, H, W).

    Raises:
        ModelError: one has none, or one activation follows convolutions of different widths.
    """
    found: dict[str, Following] = {}
    open_: tuple[str, torch.Size] | None = None
    handles = []

    def on_convolution(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            nonlocal open_
            open_ = (name, output.shape)

        return model.get_submodule(name).register_forward_hook(hook)

    def on_activation(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal open_
            if open_ is not None and args[0].shape == open_[1]:
                found[open_[0]] = Following(name, args[0].shape[1])
                open_ = None

        return module.register_forward_pre_hook(hook)

    handles += [on_convolution(name) for name in convolutions]
    handles += [on_activation(n, m) for n, m in model.named_modules() if type(m).__name__ in _ACTIVATIONS]
    try:
        run_once(model, example)
    finally:
        for handle in handles:
            handle.remove()
    widths: dict[str, int] = {}
    for name in convolutions:
        if name not in found:
            raise ModelError(
                f"no activation module follows {name} before the next binarised convolution, so there is none that "
                "rprelu could replace: 'activation: keep' leaves activations as they are",
                ("activation",),
            )
        following = found[name]
        if widths.setdefault(following.name, following.channels) != following.channels:
            raise ModelError(
                f"{following.name} follows convolutions of {widths[following.name]} and of {following.channels} "
                "channels: one rprelu can't serve both",
                ("activation",),
            )
    return found


__all__ = ["Following", "following_activations"]
