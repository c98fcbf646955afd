"""What stands in a norm's place once a pass has folded it into the convolution before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from bonn_plugin.nn.storage import StoredTensor, register_replacement


@register_replacement("folded_norm")
class FoldedNorm(nn.Module):
    """Nothing: the norm's factor and shift are part of the convolution before it."""

    kind: str
    folded = True

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x

    def stored_tensors(self) -> Mapping[str, StoredTensor]:
        """Declare that it stores nothing."""
        return {}

    def spec(self) -> dict[str, Any]:
        """Return nothing: there are no arguments."""
        return {}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> FoldedNorm:
        """Build the module."""
        return cls()


__all__ = ["FoldedNorm"]
