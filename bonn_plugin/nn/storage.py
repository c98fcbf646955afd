"""What a network stores: every module declares its tensors, their role and their bits.

Checkpoint and report are written against this page and know no layer type. A module that stores
something other than plain float parameters has a method ``stored_tensors``; everything else is
described by ``stored_tensors`` below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Protocol, Self, runtime_checkable

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from bonn_plugin.nn.resize import hand_on, unpruned


class Role(StrEnum):
    """What a stored tensor is for."""

    BINARY_WEIGHT = "binary weight"
    INTEGER_WEIGHT = "integer weight"
    REAL_WEIGHT = "real weight"
    NORM = "norm"
    SCALE = "scale"
    INDEX = "filter index"
    MASK = "sparsity mask"
    THRESHOLD = "threshold"
    NORM_STATISTICS = "norm statistics"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint.

    Attributes:
        tensor: what is written.
        role: what it is for.
        elements: numbers it holds (for packed signs more than ``tensor.numel()``).
        bits: bits one of these numbers needs.
        original_elements: float32 numbers it stands for in the full-precision network; 0 for what
            binarisation added.
    """

    tensor: Tensor
    role: Role
    elements: int
    bits: int
    original_elements: int

    @classmethod
    def real(cls, tensor: Tensor, role: Role, *, added: bool = False) -> Self:
        """Describe a tensor stored as it is; ``added`` if the full-precision network has none like it."""
        n = tensor.numel()
        return cls(tensor, role, n, tensor.element_size() * 8, 0 if added else n)

    @property
    def needed_bits(self) -> int:
        """Bits of its numbers, without the padding of the last byte."""
        return self.elements * self.bits

    @property
    def written_bits(self) -> int:
        """Bits of the tensor as it is written."""
        return self.tensor.numel() * self.tensor.element_size() * 8


@runtime_checkable
class Storing(Protocol):
    """A module that says itself what it stores."""

    def stored_tensors(self) -> Mapping[str, StoredTensor]:
        """Return its own tensors (not those of submodules) by local name."""
        ...


@dataclass(frozen=True)
class Filters:
    """Filters of a layer: its outputs, the filters that are stored for them, and outputs that are zeroed."""

    outputs: int
    stored: int
    zeroed: int = 0


@runtime_checkable
class Merging(Protocol):
    """A module that may store fewer filters than it has outputs."""

    @property
    def filters(self) -> Filters:
        """Return how many filters it has and stores."""
        ...

    def without_merging(self) -> nn.Module:
        """Return a module of the same shape that stores each filter; its tensors' values have no meaning."""
        ...


@runtime_checkable
class Replacement(Storing, Protocol):
    """A module that took another's place at ``convert``: it can be rebuilt from its ``spec``."""

    kind: str

    def spec(self) -> dict[str, Any]:
        """Return the JSON-ready arguments of ``from_spec``."""
        ...

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> nn.Module:
        """Build the module, its tensors still to be loaded. Raises ValueError on a spec that makes no sense."""
        ...


_REPLACEMENTS: dict[str, type[Any]] = {}


def register_replacement(kind: str) -> Callable[[type[Any]], type[Any]]:
    """Class decorator: checkpoints name the class by ``kind``."""

    def register(cls: type[Any]) -> type[Any]:
        if kind in _REPLACEMENTS:
            raise ValueError(f"a replacement named {kind!r} is registered already")
        cls.kind = kind
        _REPLACEMENTS[kind] = cls
        return cls

    return register


def replacement_class(kind: str) -> type[Any]:
    """Return the class registered as ``kind``; KeyError if there is none."""
    return _REPLACEMENTS[kind]


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, StoredTensor]]:
    """Yield (full name, description) of every tensor that a checkpoint of ``model`` holds.

    ``num_batches_tracked`` of batch norms is left out: only training with ``momentum=None`` reads it.
    """
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, stored in _of_whole_network(module, _own_tensors(module)).items():
            if id(stored.tensor) in seen:  # a parameter that two modules share is stored once
                continue
            seen.add(id(stored.tensor))
            yield f"{prefix}.{name}" if prefix else name, stored


def _of_whole_network(module: nn.Module, own: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
    """Let tensors that lost channels stand for as many numbers as they have in the whole network."""
    counted = dict(own)
    for original, elements in unpruned(module).items():
        # a packed or quantised form is named after what it stands for: weight_packed after weight
        for name, stored in own.items():
            if (name == original or name.startswith(f"{original}_")) and stored.original_elements:
                counted[name] = replace(stored, original_elements=elements)
                break
    return counted


def _own_tensors(module: nn.Module) -> Mapping[str, StoredTensor]:
    if isinstance(module, Storing):
        return module.stored_tensors()
    norm = isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm)) or "Norm" in type(module).__name__
    own: dict[str, StoredTensor] = {}
    for name, parameter in module.named_parameters(recurse=False):
        own[name] = StoredTensor.real(parameter, Role.NORM if norm else Role.REAL_WEIGHT)
    persistent = module.state_dict(keep_vars=True)
    for name, buffer in module.named_buffers(recurse=False):
        if name in persistent and name != "num_batches_tracked":
            own[name] = StoredTensor.real(buffer, Role.NORM_STATISTICS if norm else Role.REAL_WEIGHT)
    return own


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` where ``model`` has the submodule ``name``, under its other names too, in the same training mode."""
    old = model.get_submodule(name)
    new.train(old.training)
    hand_on(old, new)
    for parent in list(model.modules()):
        for leaf, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, leaf, new)


__all__ = [
    "Filters",
    "Merging",
    "Replacement",
    "Role",
    "StoredTensor",
    "Storing",
    "register_replacement",
    "replace_module",
    "replacement_class",
    "stored_tensors",
]
