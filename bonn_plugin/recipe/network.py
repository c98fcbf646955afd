"""The network that a recipe names."""

from __future__ import annotations

from torch import nn

from bonn_plugin.errors import ModelError
from bonn_plugin.models import ModelBuildError, build_model
from bonn_plugin.recipe.schema import Recipe


def recipe_model(recipe: Recipe) -> nn.Module:
    """Build the network of a recipe, in full precision with random weights.

    Raises:
        ModelError: timm does not know it; the message begins with the place in the recipe.
    """
    try:
        return build_model(recipe.model.name, recipe.model.num_classes, recipe.model.args)
    except ModelBuildError as error:
        raise ModelError(str(recipe.source.problem(("model", error.key), str(error)))) from error
