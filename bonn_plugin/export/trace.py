"""A model as a list of steps: torch.fx, with the modules that have a lowering of their own kept whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from bonn_plugin.errors import ExportError


def trace(model: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> tuple[nn.Module, fx.Graph]:
    """Trace a model in eval mode.

    Args:
        model: left as it is.
        is_leaf: whether a module stays one step.

    Returns:
        The copy that was traced, in eval mode, and its graph; their names are the model's.

    Raises:
        ExportError: what the model does depends on the values or the shape of its input.
    """
    frozen = copy.deepcopy(model).eval()
    for module in frozen.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    tracer = _Tracer(is_leaf)
    try:
        graph = tracer.trace(frozen)
    except Exception as error:
        text = " ".join(str(error).split())[:160]
        raise ExportError(
            f"{tracer.place(frozen)} can't be exported to OpenVINO: its forward pass can't be traced: {text}"
        ) from error
    return frozen, graph


class _Tracer(fx.Tracer):
    def __init__(self, is_leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self._is_leaf = is_leaf
        self._inside: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._is_leaf(m) or (
            m.__module__.startswith("torch.nn") and not isinstance(m, (nn.Sequential, nn.ModuleList))
        )

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self._inside.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self._inside.pop()  # not in a finally: after an error the last entry tells where it was
        return result

    def place(self, model: nn.Module) -> str:
        """Return the module where tracing stands."""
        return f"{self._inside[-1] if self._inside else type(model).__name__}"


__all__ = ["trace"]
