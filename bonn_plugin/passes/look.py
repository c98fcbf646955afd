"""What layers see when a model runs: an example of their input, and the norm that alone reads their output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bonn_plugin.errors import ModelError


@dataclass(frozen=True)
class Seen:
    """Of one layer: its input, (B, ...), and the name of the batch norm that can be folded into it, None if none."""

    input: Tensor
    norm: str | None


@dataclass
class _Output:
    layer: str
    tensor: Tensor
    readers: set[str] = field(default_factory=set)


@torch.no_grad()
def look(model: nn.Module, names: Sequence[str], images: Tensor) -> dict[str, Seen]:
    """Run ``model`` once and return what its layers ``names`` saw.

    A norm can be folded into a convolution whose output nothing else reads, where each of them is called once.

    Args:
        model: in eval mode.
        names: convolutions and linear layers.
        images: (B, C, H, W).

    Raises:
        ModelError: the model does not take the images, or does not call a layer.
    """
    inputs: dict[str, Tensor] = {}
    calls: dict[str, int] = {}
    outputs: dict[int, _Output] = {}
    inside: list[str] = []
    handles = []

    class Readers(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and id(leaf) in outputs:
                    outputs[id(leaf)].readers.add(inside[-1] if inside else "")
            return func(*args, **(kwargs or {}))

    def watch_layer(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            inputs.setdefault(name, args[0].detach())
            outputs[id(output)] = _Output(name, output)  # kept, so that its id stays its own

        return hook

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            calls[name] = calls.get(name, 0) + 1
            inside.append(name)

        return hook

    def leave(*_: Any) -> None:
        inside.pop()

    norms = {n: m for n, m in model.named_modules() if type(m) is nn.BatchNorm2d and m.running_mean is not None}
    for name in names:
        handles.append(model.get_submodule(name).register_forward_hook(watch_layer(name)))
    for name, norm in norms.items():
        handles.append(norm.register_forward_pre_hook(enter(name)))
        handles.append(norm.register_forward_hook(leave))
    try:
        with Readers():  # type: ignore[no-untyped-call]
            result = model(images)
    finally:
        for handle in handles:
            handle.remove()
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor) and id(leaf) in outputs:
            outputs[id(leaf)].readers.add("")
    seen: dict[str, Seen] = {}
    partner = {o.layer: next(iter(o.readers)) for o in outputs.values() if len(o.readers) == 1}
    for name in names:
        if name not in inputs:
            raise ModelError(f"{name} is not reached by the forward pass: there is nothing to quantise it by")
        norm_name = partner.get(name) if calls[name] == 1 else None
        if not norm_name or calls[norm_name] != 1 or not isinstance(model.get_submodule(name), nn.Conv2d):
            norm_name = None
        seen[name] = Seen(inputs[name], norm_name)
    return seen


__all__ = ["Seen", "look"]
