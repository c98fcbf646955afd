"""The network that a recipe names."""

from __future__ import annotations

from torch import nn

from bonn_plugin.errors import ModelError
from bonn_plugin.models import ModelBuildError, build_detector, build_model
from bonn_plugin.recipe.model import DetectionModelConfig, NetworkConfig
from bonn_plugin.recipe.schema import Recipe


def build_network(config: NetworkConfig) -> nn.Module:
    """Build a network from its settings, with random weights.

    Raises:
        ModelBuildError: timm does not know it, or does not take the settings.
    """
    if isinstance(config, DetectionModelConfig):
        return build_detector(config.name, config.num_classes, config.args, config.settings)
    return build_model(config.name, config.num_classes, config.args)


def recipe_model(recipe: Recipe) -> nn.Module:
    """Build the network of a recipe, in full precision with random weights.

    Raises:
        ModelError: timm does not know it; the message begins with the place in the recipe.
    """
    try:
        return build_network(recipe.model)
    except ModelBuildError as error:
        raise ModelError(str(recipe.source.problem(("model", error.key), str(error)))) from error
