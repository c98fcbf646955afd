"""Recipes: YAML in, a frozen and validated ``Recipe`` out."""

from bonn_plugin.recipe.load import dump_recipe, load_recipe, parse_recipe
from bonn_plugin.recipe.network import recipe_model
from bonn_plugin.recipe.positions import Problem, RecipeError
from bonn_plugin.recipe.schema import (
    CifarConfig,
    DataConfig,
    DigitsConfig,
    ImageFolderConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    ScheduleConfig,
    TrainingConfig,
)
from bonn_plugin.recipe.stages import earlier_recipes, needed_runs, recipe_of_run

__all__ = [
    "CifarConfig",
    "DataConfig",
    "DigitsConfig",
    "ImageFolderConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Problem",
    "Recipe",
    "RecipeError",
    "ScheduleConfig",
    "TrainingConfig",
    "dump_recipe",
    "earlier_recipes",
    "load_recipe",
    "needed_runs",
    "parse_recipe",
    "recipe_model",
    "recipe_of_run",
]
