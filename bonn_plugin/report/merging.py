"""What merging filters saves: the same network counted as if each filter were stored."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from bonn_plugin.nn import Filters, Merging, replace_module
from bonn_plugin.nn.operations import Macs, count_macs
from bonn_plugin.report.ledger import Ledger, ledger


@dataclass(frozen=True)
class Unmerged:
    """A network with merged filters, counted without the merging.

    Attributes:
        filters: by layer, of all layers whose filters could be merged.
        book: what would be stored.
        macs: multiply-accumulates for one image.
    """

    filters: Mapping[str, Filters]
    book: Ledger
    macs: Macs

    @property
    def total(self) -> Filters:
        """The filters of all layers together."""
        layers = self.filters.values()
        return Filters(sum(f.outputs for f in layers), sum(f.stored for f in layers), sum(f.zeroed for f in layers))


def unmerged(packed: nn.Module, example: Tensor) -> Unmerged | None:
    """Count ``packed`` without merging, for one image of the shape of ``example``; None if nothing is merged."""
    layers = {name: module for name, module in packed.named_modules() if isinstance(module, Merging)}
    filters = {name: layer.filters for name, layer in layers.items()}
    if all(f.stored == f.outputs for f in filters.values()):
        return None
    whole = copy.deepcopy(packed)
    for name, layer in layers.items():
        replace_module(whole, name, layer.without_merging())
    return Unmerged(filters, ledger(whole), sum(count_macs(whole, example).values(), Macs()))
