"""What a recipe does to a network, in a few words, and the settings in which recipes differ."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from bonn_plugin.modifiers.base import ModifierConfig
from bonn_plugin.recipe import Recipe

SELECTING = frozenset({"type", "targets", "expect"})
"""Settings that say which layers, not how."""


def method_of(recipe: Recipe) -> str:
    """Return the modifiers in order, such as ``bonn(ste polynomial) + kernel_loss + filter_merge``.

    ``binarize`` is shown by its ``method``, with the settings that are not that one's defaults.
    """
    if not recipe.modifiers:
        return "full precision"
    return " + ".join(_named(config) for config in recipe.modifiers)


def _named(config: ModifierConfig) -> str:
    if config.type != "binarize":
        return config.type
    method = str(getattr(config, "method", config.type))
    usual = type(config).model_validate({"method": method} if hasattr(config, "method") else {})
    shown = [name for name in type(config).model_fields if name not in SELECTING | {"method"}]
    values = [(name, getattr(config, name), getattr(usual, name)) for name in shown]
    changed = [f"{name} {_short(value)}" for name, value, default in values if value != default]
    return f"{method}({', '.join(changed)})" if changed else method


def settings_of(recipe: Recipe) -> dict[str, str]:
    """Return all settings but the name, as text by dotted key; modifiers by their type, a second one as ``TYPE.2``."""
    dump = recipe.model_dump(mode="json", by_alias=True, exclude={"name", "modifiers"})
    seen: Counter[str] = Counter()
    for config in recipe.modifiers:
        seen[config.type] += 1
        key = config.type if seen[config.type] == 1 else f"{config.type}.{seen[config.type]}"
        dump[key] = config.model_dump(mode="json", by_alias=True)
    flat: dict[str, str] = {}
    _flatten("", dump, flat)
    return flat


def _flatten(prefix: str, value: Any, into: dict[str, str]) -> None:
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            _flatten(f"{prefix}.{key}" if prefix else str(key), part, into)
    else:
        into[prefix] = _short(value)


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


__all__ = ["method_of", "settings_of"]
