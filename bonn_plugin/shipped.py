"""The recipes that come with the package."""

from __future__ import annotations

from pathlib import Path

from bonn_plugin.errors import BonnError
from bonn_plugin.modifiers import near_names

_PLACES = (Path(__file__).parent / "shipped_recipes", Path(__file__).parent.parent / "recipes")


def shipped_recipes() -> dict[str, Path]:
    """Return the files by name, in alphabetical order."""
    folder = next((place for place in _PLACES if place.is_dir()), None)
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))} if folder else {}


def find_recipe(name: str) -> Path:
    """Return the file that ``name`` means: a path, or the name of a shipped recipe.

    Raises:
        BonnError: neither is there.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    what = "is a folder, not a recipe file" if path.is_dir() else "no such file, nor a shipped recipe"
    raise BonnError(f"{name}: {what}.{near_names(name, list(shipped)) or ' See: bonn recipes'}")
