"""The task that a recipe names."""

from __future__ import annotations

from bonn_plugin.recipe import Recipe
from bonn_plugin.sampling import ALONE, Share
from bonn_plugin.train.classification import Classification
from bonn_plugin.train.detection import Detection
from bonn_plugin.train.task import Task


def make_task(recipe: Recipe, *, pin: bool = False, share: Share = ALONE) -> Task:
    """Open the recipe's data for its task; ``pin`` the batches' memory for a GPU; load a ``share`` of each batch.

    Raises:
        DataError: the data set is not there, or does not fit the model.
    """
    if recipe.model.task == "detection":
        return Detection(recipe, pin=pin, share=share)
    return Classification(recipe, pin=pin, share=share)
