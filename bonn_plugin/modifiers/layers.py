"""Selectors of layers in full precision: convolutions and linear layers by name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from bonn_plugin.errors import ModelError
from bonn_plugin.modifiers.select import near_names


def real_layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Return all convolutions and linear layers in full precision, by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}


def select_layers(model: nn.Module, selectors: Sequence[str], key: str = "targets") -> dict[str, nn.Conv2d | nn.Linear]:
    """Return the layers in full precision that ``selectors`` match, by name, in the model's order.

    Args:
        model: nothing is changed.
        selectors: an exact name, ``re:`` and a pattern that matches the full name, or ``class:`` and a class name.
        key: the setting that holds them, for the place of an error.

    Raises:
        ModelError: a selector matches none.
    """
    layers = real_layers(model)
    modules = dict(model.named_modules())
    taken: set[str] = set()
    for i, selector in enumerate(selectors):
        kind, colon, rest = selector.partition(":")
        if colon and kind == "re":
            found = [name for name in layers if re.fullmatch(rest, name)]
        elif colon and kind == "class":
            found = [name for name, layer in layers.items() if type(layer).__name__ == rest]
        else:
            found = [selector] if selector in layers else []
        if not found:
            if not colon and selector in modules:
                why = f"{selector} is a {type(modules[selector]).__name__}"
            else:
                why = f"{selector!r} matches none"
            hint = "" if colon else near_names(selector, list(layers))
            raise ModelError(f"{why}: no convolution or linear layer in full precision.{hint}", (key, i))
        taken.update(found)
    return {name: layer for name, layer in layers.items() if name in taken}


__all__ = ["real_layers", "select_layers"]
