"""The order of modifiers: what can't follow what, with the reason."""

import pytest

from bonn_plugin import parse_recipe
from bonn_plugin.modifiers import ModifierConfig, Stage
from bonn_plugin.recipe import RecipeError
from tests.conftest import TINY

LINES = {
    "channel_prune": "{type: channel_prune, ratio: 0.5}",
    "binarize": "{type: binarize}",
    "kernel_loss": "{type: kernel_loss, lambda: 1e-3, nu: 1e-3}",
    "filter_merge": "{type: filter_merge, keep: 0.5}",
    "feature_loss": "{type: feature_loss, theta: 1e-3}",
    "distill": "{type: distill, teacher: {folder: x}}",
    "magnitude_prune": "{type: magnitude_prune, sparsity: 0.5}",
}
RIGHT = tuple(LINES)


def problems(*types):
    text = TINY.partition("modifiers:")[0] + "modifiers:\n" + "".join(f"  - {LINES[t]}\n" for t in types)
    try:
        parse_recipe(text, "r.yaml")
    except RecipeError as error:
        return [p.message for p in error.problems]
    return []


def test_the_order_of_the_stages_is_accepted():
    assert problems(*RIGHT) == []


@pytest.mark.parametrize(
    ("types", "said"),
    [
        (
            ("binarize", "channel_prune"),
            ["channel_prune must stand before binarize in the list: it takes channels from the real-valued network"],
        ),
        (
            ("magnitude_prune", "binarize"),
            ["binarize must stand before magnitude_prune in the list: it takes real-valued convolutions"],
        ),
        (
            ("distill", "binarize"),
            ["binarize must stand before distill in the list: it takes real-valued convolutions"],
        ),
        (
            ("kernel_loss", "binarize"),
            ["kernel_loss needs a binarize before it in the list: its loss is over 1-bit kernels"],
        ),
        (("filter_merge",), ["filter_merge needs a binarize before it in the list: it merges 1-bit filters"]),
    ],
)
def test_each_wrong_order_is_told_once_with_the_reason(types, said):
    assert problems(*types) == said


@pytest.mark.parametrize("i", range(len(RIGHT) - 1))
def test_of_two_neighbours_at_least_those_of_one_stage_may_change_places(i):
    swapped = list(RIGHT)
    swapped[i], swapped[i + 1] = swapped[i + 1], swapped[i]
    assert bool(problems(*swapped)) == (i in (0, 1))


class Last(ModifierConfig):
    type: str = "last"
    stage = Stage.STORE


class Anywhere(ModifierConfig):
    type: str = "anywhere"


def test_a_third_partys_modifier_declares_its_stage_or_stands_anywhere():
    last, anywhere = Last(), Anywhere()
    assert list(anywhere.order_problems((last,))) == []
    assert list(last.order_problems((anywhere,))) == []

    class Loss(ModifierConfig):
        type: str = "loss"
        stage = Stage.TRAIN

    assert list(Loss().order_problems((last,))) == [
        "loss must stand before last in the list: it works while the network is trained"
    ]
