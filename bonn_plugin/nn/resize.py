"""Modules with fewer channels than the network of their name has: noted, stored and rebuilt.

A module that lost channels carries ``unpruned``: the elements of each of its tensors in the whole network.
``replace_module`` hands it on, so that rates are against the whole network whatever took the module's place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

ATTRIBUTES: Mapping[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("in_channels", "out_channels", "groups"),
    nn.Linear: ("in_features", "out_features"),
    nn.BatchNorm2d: ("num_features",),
    nn.BatchNorm1d: ("num_features",),
    nn.PReLU: ("num_parameters",),
}
"""What else tells the size of a module."""


def note_unpruned(module: nn.Module, elements: Mapping[str, int]) -> None:
    """Note how many elements the tensors of ``module`` have in the whole network, by local name."""
    vars(module)["unpruned"] = dict(elements)


def unpruned(module: nn.Module) -> Mapping[str, int]:
    """Return what ``note_unpruned`` noted, nothing for a module that lost no channel."""
    noted: Mapping[str, int] = vars(module).get("unpruned", {})
    return noted


def hand_on(old: nn.Module, new: nn.Module) -> None:
    """Let ``new``, which takes the place of ``old``, carry its note."""
    noted = unpruned(old)
    if noted and not unpruned(new):
        note_unpruned(new, noted)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers of a module alone, by local name."""
    kept = module.state_dict(keep_vars=True)
    tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    return {name: tensor for name, tensor in tensors.items() if name in kept}


def size_of(module: nn.Module) -> dict[str, Any] | None:
    """Return the JSON-ready size of a module: its attributes and its tensors' shapes; None for kinds not known."""
    for kind, names in ATTRIBUTES.items():
        if isinstance(module, kind):
            return {
                "attributes": {name: int(getattr(module, name)) for name in names},
                "shapes": {name: list(tensor.shape) for name, tensor in own_tensors(module).items() if tensor.dim()},
            }
    return None


def resize(module: nn.Module, size: Mapping[str, Any]) -> None:
    """Give a module the size that ``size_of`` told, its tensors still to be loaded.

    Raises:
        ValueError: the size is not one of such a module.
    """
    kinds = [kind for kind in ATTRIBUTES if isinstance(module, kind)]
    names = ATTRIBUTES[kinds[0]] if kinds else ()
    own = own_tensors(module)
    attributes, shapes = size.get("attributes"), size.get("shapes")
    if not kinds or not isinstance(attributes, dict) or not isinstance(shapes, dict):
        raise ValueError(f"no size of a {type(module).__name__}")
    if set(attributes) != set(names) or set(shapes) != {name for name, tensor in own.items() if tensor.dim()}:
        raise ValueError(f"the size of a {type(module).__name__} has other parts")
    for name, value in attributes.items():
        if type(value) is not int or not 1 <= value <= getattr(module, name):
            raise ValueError(f"{name} can't become {value!r}")
        setattr(module, name, value)
    for name, shape in shapes.items():
        old = own[name]
        fits = len(shape) == old.dim() and all(type(n) is int and n >= 1 for n in shape)
        # a depthwise kernel keeps its second dimension, every other one shrinks
        if not fits or any(n > o for n, o in zip(shape, old.shape, strict=True)):
            raise ValueError(f"{name} of shape {tuple(old.shape)} can't become {shape!r}")
        new = torch.zeros(shape, dtype=old.dtype, device=old.device)
        if isinstance(old, nn.Parameter):
            setattr(module, name, nn.Parameter(new))
        else:
            module.register_buffer(name, new)


__all__ = ["ATTRIBUTES", "hand_on", "note_unpruned", "own_tensors", "resize", "size_of", "unpruned"]
