"""Recipes: YAML in, a frozen and validated ``Recipe`` out."""

from bonn_plugin.recipe.data import (
    CifarConfig,
    CocoConfig,
    DataConfig,
    DigitScenesConfig,
    DigitsClutterConfig,
    DigitsConfig,
    ImageFolderConfig,
    PhotosConfig,
    VocConfig,
)
from bonn_plugin.recipe.load import dump_recipe, load_recipe, parse_recipe
from bonn_plugin.recipe.model import AnyModelConfig, DetectionModelConfig, ModelConfig, NetworkConfig
from bonn_plugin.recipe.network import build_network, recipe_model
from bonn_plugin.recipe.positions import Problem, RecipeError
from bonn_plugin.recipe.schema import OptimizerConfig, Recipe, ScheduleConfig, TrainingConfig
from bonn_plugin.recipe.stages import earlier_recipes, needed_runs, recipe_of_run

__all__ = [
    "AnyModelConfig",
    "CifarConfig",
    "CocoConfig",
    "DataConfig",
    "DetectionModelConfig",
    "DigitScenesConfig",
    "DigitsClutterConfig",
    "DigitsConfig",
    "ImageFolderConfig",
    "ModelConfig",
    "NetworkConfig",
    "OptimizerConfig",
    "PhotosConfig",
    "Problem",
    "Recipe",
    "RecipeError",
    "ScheduleConfig",
    "TrainingConfig",
    "VocConfig",
    "build_network",
    "dump_recipe",
    "earlier_recipes",
    "load_recipe",
    "needed_runs",
    "parse_recipe",
    "recipe_model",
    "recipe_of_run",
]
