"""Weights to start from: ``model.init_from``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bonn_plugin.errors import CheckpointError
from bonn_plugin.recipe import Recipe


class Start:
    """Weights that a run starts from.

    Args:
        recipe: its ``model.init_from`` stands in messages.
        weights: tensors by name.
        tell: where to say what is not taken.
    """

    def __init__(self, recipe: Recipe, weights: Mapping[str, Tensor], tell: Callable[[str], None]) -> None:
        self.recipe = recipe
        self.weights = weights
        self.tell = tell

    @torch.no_grad()
    def fill(self, model: nn.Module, *, added_only: bool = False) -> None:
        """Copy the weights into ``model``; with ``added_only`` what binarisation added, where it is given.

        Raises:
            CheckpointError: a tensor is missing or of another shape, except that of a classifier.
        """
        place = self.recipe.source.problem(("model", "init_from"), "").__str__()
        classifier = {
            f"{n}.{p}" for n, m in model.named_modules() if m is _classifier(model) for p in ("weight", "bias")
        }
        own = model.state_dict()
        missing = [n for n in own if n not in self.weights and not n.endswith("num_batches_tracked")]
        if missing and not added_only:
            raise CheckpointError(
                f"{place}{self.recipe.model.init_from} has no {missing[0]!r}, which {self.recipe.model.name} needs "
                f"({len(missing)} of {len(own)} tensors are missing): is it of another network?"
            )
        for name, target in own.items():
            given = self.weights.get(name)
            if given is None:
                continue
            if given.shape == target.shape:
                target.copy_(given)
            elif name in classifier:
                if not added_only:
                    shapes = f"{tuple(given.shape)}, needed is {tuple(target.shape)}"
                    self.tell(f"init_from: {name} starts anew: the given one has shape {shapes}")
            else:
                raise CheckpointError(
                    f"{place}{self.recipe.model.init_from}: {name!r} has shape {tuple(given.shape)}, "
                    f"{self.recipe.model.name} needs {tuple(target.shape)}"
                )


def _classifier(model: nn.Module) -> Any:
    getter: Any = getattr(model, "get_classifier", None)
    return getter() if callable(getter) else None
