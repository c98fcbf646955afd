"""Multiply-accumulates of a network for one image, binary and real apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from bonn_plugin.nn.modes import run_once

BINARY_PER_REAL = 64
"""Binary operations that one instruction does: OPs = BOPs / 64 + FLOPs (Bi-Real Net, ECCV 2018, section 4.3)."""


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates for one image."""

    binary: int = 0
    real: int = 0

    def __add__(self, other: Macs) -> Macs:
        return Macs(self.binary + other.binary, self.real + other.real)

    @property
    def ops(self) -> float:
        """BOPs / 64 + FLOPs."""
        return self.binary / BINARY_PER_REAL + self.real


@runtime_checkable
class Counting(Protocol):
    """A module that counts its own multiply-accumulates."""

    def macs(self, output: Tensor) -> Macs:
        """Return the count for one image, given an output (B, ...)."""
        ...


def count_macs(model: nn.Module, example: Tensor) -> dict[str, Macs]:
    """Return the multiply-accumulates per module for one image of the shape of ``example``, (B, C, H, W).

    Convolutions, linear layers and modules that count themselves; everything else is left out, as in the
    literature's figures. The model is run once in eval mode.

    Raises:
        ModelError: it does not take the example.
    """
    counts: dict[str, Macs] = {}

    def count(name: str, module: nn.Module, output: Tensor) -> None:
        counts[name] = counts.get(name, Macs()) + _count(module, output)

    _watch(model, example, count)
    return counts


def output_channels(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Return C of the output (B, C, ...) of each layer that ``count_macs`` counts, for an input like ``example``."""
    channels: dict[str, int] = {}

    def note(name: str, module: nn.Module, output: Tensor) -> None:
        channels[name] = output.shape[1]

    _watch(model, example, note)
    return channels


@torch.no_grad()
def _watch(model: nn.Module, example: Tensor, see: Callable[[str, nn.Module, Tensor], None]) -> None:
    """Run ``model`` once in eval mode and show ``see`` the outputs of its layers."""

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, _: object, output: Tensor) -> None:
            see(name, module, output)

        return module.register_forward_hook(hook)

    handles = [
        watch(name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) or hasattr(module, "macs")
    ]
    try:
        run_once(model, example)
    finally:
        for handle in handles:
            handle.remove()


def _count(module: nn.Module, output: Tensor) -> Macs:
    if isinstance(module, Counting):
        return module.macs(output)
    assert isinstance(module, (nn.Conv2d, nn.Linear))
    # A linear layer may work on every position of a sequence or a map.
    return Macs(real=output[0].numel() * math.prod(module.weight.shape[1:]))
