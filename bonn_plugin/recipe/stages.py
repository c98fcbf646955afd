"""Chains of runs: which recipes must be trained before one that starts from them, or learns from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path as FilePath

from bonn_plugin.errors import BonnError
from bonn_plugin.modifiers.base import RunOf
from bonn_plugin.recipe.load import load_recipe
from bonn_plugin.recipe.positions import Path, Problem, RecipeError
from bonn_plugin.recipe.schema import Recipe
from bonn_plugin.shipped import find_recipe

DEEPEST_CHAIN = 4
"""Runs that may stand behind each other."""


def earlier_recipes(recipe: Recipe) -> tuple[Recipe, ...]:
    """Return the recipes that must have run before ``recipe``, each once, in the order to run them.

    Raises:
        RecipeError: one can't be found or has mistakes, they lead in a circle or too deep, or two have one name.
    """
    found: list[Recipe] = []
    _collect(recipe, (recipe,), found)
    for i, earlier in enumerate(found):
        for other in (*found[:i], recipe):
            if earlier.name == other.name:
                raise RecipeError(
                    [
                        Problem(
                            recipe.source.source,
                            0,
                            0,
                            f"{earlier.source.source} and {other.source.source} have the same name {other.name!r}: "
                            "their runs would share one folder",
                        )
                    ]
                )
    return tuple(found)


def recipe_of_run(recipe: Recipe, run: RunOf, path: Path) -> Recipe:
    """Return the recipe that ``run``, at ``path`` in ``recipe``, names.

    A file is looked for beside the file of ``recipe``, with and without ``.yaml``, then from the current folder,
    then among the shipped recipes.

    Raises:
        RecipeError: it can't be found, or has mistakes.
    """
    beside = FilePath(recipe.source.source).parent
    files = [beside / run.recipe, beside / f"{run.recipe}.yaml"]
    try:
        return load_recipe(next((file for file in files if file.is_file()), None) or find_recipe(run.recipe))
    except RecipeError as error:
        place = recipe.source.problem((*path, "recipe"), "").__str__()
        raise RecipeError(
            [Problem(f"{place}{p.source}", p.line, p.column, p.message) for p in error.problems]
        ) from None
    except BonnError as error:
        raise RecipeError([recipe.source.problem((*path, "recipe"), str(error))]) from None


def needed_runs(recipe: Recipe) -> Iterator[tuple[Path, RunOf]]:
    """Yield (path, run) for each run that ``recipe`` itself names."""
    if isinstance(recipe.model.init_from, RunOf):
        yield ("model", "init_from"), recipe.model.init_from
    for i, config in enumerate(recipe.modifiers):
        for path, run in config.runs():
            yield ("modifiers", i, *path), run


def _collect(recipe: Recipe, behind: tuple[Recipe, ...], found: list[Recipe]) -> None:
    for path, run in needed_runs(recipe):
        earlier = recipe_of_run(recipe, run, path)
        if earlier in behind:
            circle = " -> ".join(r.name for r in (*behind[behind.index(earlier) :], earlier))
            raise RecipeError([recipe.source.problem(path, f"the recipes lead in a circle: {circle}")])
        if len(behind) > DEEPEST_CHAIN:
            raise RecipeError([recipe.source.problem(path, f"more than {DEEPEST_CHAIN} runs behind each other")])
        _collect(earlier, (*behind, earlier), found)
        if earlier not in found:
            found.append(earlier)
