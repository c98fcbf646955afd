"""Convolutions that a forward pass does not use as convolutions: found by watching one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from bonn_plugin.nn.modes import run_once

NOT_CALLED = "not called by the forward pass"
WEIGHT_ELSEWHERE = "its weight is computed with outside of its own call"

_LOOKS = frozenset({"size", "dim", "numel", "stride", "is_floating_point", "is_complex", "element_size"})
"""What reads a tensor's dtype, device or shape, and not its values."""
_LIKE_ANOTHER = frozenset({"to", "type_as"})
"""What makes its first operand like another one, of which it reads no more than dtype and device."""
_VALUES = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})
"""Attributes that are other views of its values; all others are looks."""


def misused(model: nn.Module, convolutions: Mapping[str, nn.Conv2d], example: Tensor) -> dict[str, str]:
    """Return why some of ``convolutions`` can't be replaced by a layer of another weight, by name.

    Args:
        model: the network; run once in eval mode.
        convolutions: by name.
        example: (B, C, H, W).

    Returns:
        Those that ``model`` does not call, and those whose weight it uses besides. A look at the weight's dtype,
        device or shape is no use.

    Raises:
        ModelError: the model does not take the example.
    """
    watch = _Watch(convolutions)
    handles: list[RemovableHandle] = []
    for name, conv in convolutions.items():
        handles += [
            conv.register_forward_pre_hook(watch.enter(name)),
            conv.register_forward_hook(watch.leave(name), always_call=True),
        ]
    try:
        with watch:
            run_once(model, example)
    finally:
        for handle in handles:
            handle.remove()
    reasons = {name: NOT_CALLED for name in convolutions if name not in watch.called}
    return reasons | dict.fromkeys(watch.elsewhere, WEIGHT_ELSEWHERE)


class _Watch(TorchFunctionMode):
    """Sees every torch function of a forward pass, and which convolution is at work."""

    def __init__(self, convolutions: Mapping[str, nn.Conv2d]) -> None:
        super().__init__()
        self._owners = {id(conv.weight): name for name, conv in convolutions.items()}
        self._inside: list[str] = []
        self.called: set[str] = set()
        self.elsewhere: set[str] = set()

    def enter(self, name: str) -> Callable[..., None]:
        """Return a hook for the beginning of a convolution's call."""

        def hook(*_: Any) -> None:
            self.called.add(name)
            self._inside.append(name)

        return hook

    def leave(self, name: str) -> Callable[..., None]:
        """Return a hook for its end."""

        def hook(*_: Any) -> None:
            self._inside.remove(name)

        return hook

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not _only_looks(func):
            used = args[:1] if getattr(func, "__name__", "") in _LIKE_ANOTHER else (*args, *(kwargs or {}).values())
            for tensor in _tensors(used):
                owner = self._owners.get(id(tensor))
                if owner is not None and owner not in self._inside:
                    self.elsewhere.add(owner)
        return func(*args, **(kwargs or {}))


def _only_looks(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") not in _VALUES
    return name in _LOOKS or name.startswith("new_") or name.endswith("_like")


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
