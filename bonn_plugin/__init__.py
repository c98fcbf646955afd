"""1-bit convolutional networks (BONN, ICCV 2019 and IJCV 2022) by recipe.

The names are loaded when they are first used: torch and timm take seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bonn_plugin.checkpoint import load_packed, save_packed, verify_packed
    from bonn_plugin.errors import BonnError
    from bonn_plugin.modifiers import register_modifier
    from bonn_plugin.recipe import ModelConfig, Recipe, load_recipe, parse_recipe
    from bonn_plugin.report import ledger
    from bonn_plugin.session import Session

_HOME = {
    "BonnError": "errors",
    "ModelConfig": "recipe",
    "Recipe": "recipe",
    "Session": "session",
    "ledger": "report",
    "load_packed": "checkpoint",
    "load_recipe": "recipe",
    "parse_recipe": "recipe",
    "register_modifier": "modifiers",
    "save_packed": "checkpoint",
    "verify_packed": "checkpoint",
}

__all__ = [
    "BonnError",
    "ModelConfig",
    "Recipe",
    "Session",
    "ledger",
    "load_packed",
    "load_recipe",
    "parse_recipe",
    "register_modifier",
    "save_packed",
    "verify_packed",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
