"""Weights to start from: ``model.init_from``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bonn_plugin.errors import CheckpointError
from bonn_plugin.modifiers.base import RunOf
from bonn_plugin.recipe import Recipe, recipe_of_run


def start_place(recipe: Recipe, folder: Path) -> Path | None:
    """Return where a run of ``recipe`` in ``folder`` takes its first weights from, None where nowhere.

    Raises:
        RecipeError: ``model.init_from`` names a recipe that can't be found.
    """
    given = recipe.model.init_from
    if isinstance(given, RunOf):
        return folder.parent / recipe_of_run(recipe, given, ("model", "init_from")).name
    return Path(given) if given else None


class Start:
    """Weights that a run starts from.

    Args:
        recipe: the place of its ``model.init_from`` stands in messages.
        given: where the weights came from, for messages.
        weights: tensors by name.
        tell: where to say what is not taken.
    """

    def __init__(self, recipe: Recipe, given: str, weights: Mapping[str, Tensor], tell: Callable[[str], None]) -> None:
        self.recipe = recipe
        self.given = given
        self.weights = weights
        self.tell = tell
        self._filled: set[str] = set()

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
                f"{place}{self.given} has no {missing[0]!r}, which {self.recipe.model.name} needs "
                f"({len(missing)} of {len(own)} tensors are missing): is it of another network?"
            )
        for name, target in own.items():
            given = self.weights.get(name)
            if given is None or name in self._filled:  # what was there before may have been pruned since
                continue
            self._filled.add(name)
            if given.shape == target.shape:
                target.copy_(given)
            elif name in classifier:
                if not added_only:
                    shapes = f"{tuple(given.shape)}, needed is {tuple(target.shape)}"
                    self.tell(f"init_from: {name} starts anew: the given one has shape {shapes}")
            else:
                raise CheckpointError(
                    f"{place}{self.given}: {name!r} has shape {tuple(given.shape)}, "
                    f"{self.recipe.model.name} needs {tuple(target.shape)}"
                )


def _classifier(model: nn.Module) -> Any:
    getter: Any = getattr(model, "get_classifier", None)
    return getter() if callable(getter) else None
