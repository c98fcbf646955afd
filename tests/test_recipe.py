"""Recipes: what is read is what was written, and every mistake has its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bonn_plugin.modifiers import BinarizeConfig, KernelLossConfig
from bonn_plugin.recipe import (
    DigitsConfig,
    ImageFolderConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    RecipeError,
    TrainingConfig,
    dump_recipe,
    load_recipe,
    parse_recipe,
)
from bonn_plugin.recipe.positions import parse_yaml
from bonn_plugin.shipped import shipped_recipes
from tests.small import RECIPE

FUZZ = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("file", shipped_recipes().values(), ids=lambda file: file.stem)
def test_a_shipped_recipe_comes_back_from_its_dump(file: Path) -> None:
    recipe = load_recipe(file)
    again = parse_recipe(dump_recipe(recipe))
    assert again == recipe
    assert again.fingerprint == recipe.fingerprint
    assert recipe.name == file.stem
    assert dump_recipe(again) == dump_recipe(recipe)


def test_a_recipe_made_in_python_comes_back_from_its_dump() -> None:
    for data in (DigitsConfig(), ImageFolderConfig(root="/data")):
        recipe = Recipe(
            name="by_hand",
            model=ModelConfig(name="bonn_wrn22_16", num_classes=10),
            data=data,
            training=TrainingConfig(epochs=2, batch_size=8, optimizer=OptimizerConfig(lr=0.1)),
            modifiers=(BinarizeConfig(), KernelLossConfig(**{"lambda": 1e-4, "nu": 1e-3})),
        )
        again = parse_recipe(dump_recipe(recipe))
        assert again.fingerprint == recipe.fingerprint


TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs"]))
NETWORK_ARGUMENTS = st.recursive(
    st.one_of(st.booleans(), st.integers(-(10**17), 10**17), st.floats(allow_nan=False, allow_infinity=False), TEXT),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=3,
)


@FUZZ
@given(args=st.dictionaries(TEXT, NETWORK_ARGUMENTS, max_size=3))
def test_any_network_argument_that_is_taken_comes_back_from_the_dump(args: dict[str, Any]) -> None:
    try:
        model = ModelConfig(name="bonn_wrn22_16", num_classes=10, args=args)
    except ValueError:
        return
    recipe = parse_recipe(RECIPE).model_copy(update={"model": model})
    again = parse_recipe(dump_recipe(recipe))
    assert again.model == model
    assert again.fingerprint == recipe.fingerprint


@pytest.mark.parametrize("value", ["1e-5", "5e-324", "1e16", "1e-4", "3.5e-7"])
def test_small_and_large_numbers_come_back_from_the_dump(value: str) -> None:
    recipe = parse_recipe(RECIPE.replace("depth: 10", f"depth: 10, x: {value}"))
    assert parse_recipe(dump_recipe(recipe)).model.args["x"] == float(value)


def test_equal_settings_have_equal_fingerprints_however_written() -> None:
    other = RECIPE.replace("1e-3", "0.001").replace("{name: digits, size: 8}", "\n  size: 8\n  name: 'digits'  # real")
    assert parse_recipe(other).fingerprint == parse_recipe(RECIPE).fingerprint
    explicit = RECIPE.replace("size: 8", "size: 8, pad: 0")
    assert parse_recipe(explicit).fingerprint == parse_recipe(RECIPE).fingerprint
    changed = RECIPE.replace("lambda: 1e-3", "lambda: 1.1e-3")
    assert parse_recipe(changed).fingerprint != parse_recipe(RECIPE).fingerprint


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-3", -3),
        ("+7", 7),
        ("0x1F", 31),
        ("0o17", 15),
        ("017", 17),
        ("1_000", "1_000"),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("True", "True"),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ('"true"', "true"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        ("1.2.3", "1.2.3"),
        ("=", "="),
        ("<<", "<<"),
    ],
)
def test_a_scalar_follows_yaml_1_2(text: str, value: object) -> None:
    read = parse_yaml(f"key: {text}\n", "recipe")[0]["key"]
    assert read == value
    assert type(read) is type(value)


def test_infinities_and_nan_are_floats() -> None:
    read = parse_yaml("[.inf, -.inf, .nan, .NaN]", "recipe")[0]
    assert read[:2] == [float("inf"), float("-inf")]
    assert all(value != value for value in read[2:])


def test_overrides_change_what_they_name() -> None:
    recipe = parse_recipe(
        RECIPE,
        overrides=[
            "training.epochs=7",
            "training.optimizer.lr=2e-2",
            "training.optimizer.lr_by_role={modulation: 1e-2}",
            "modifiers.kernel_loss.end=5",
            "modifiers.0.threshold=always",
            "data.pad=1",
            "name=other",
        ],
    )
    assert recipe.name == "other"
    assert recipe.training.epochs == 7
    assert recipe.training.optimizer.lr == 2e-2
    assert recipe.training.optimizer.lr_by_role == {"modulation": 1e-2}
    binarize, kernel_loss = recipe.modifiers
    assert isinstance(binarize, BinarizeConfig)
    assert isinstance(kernel_loss, KernelLossConfig)
    assert kernel_loss.end == 5
    assert binarize.threshold == "always"
    assert recipe.data == DigitsConfig(name="digits", size=8, pad=1)


def test_the_later_override_wins() -> None:
    overrides = ["training.epochs=7", "training.epochs=3"]
    assert parse_recipe(RECIPE, overrides=overrides).training.epochs == 3
    with pytest.raises(RecipeError, match=r"^--set training.epochs=0: epochs must be"):
        parse_recipe(RECIPE, overrides=["training.epochs=7", "training.epochs=0"])


def test_an_override_repairs_what_the_file_lacks() -> None:
    text = RECIPE.replace(", lr: 1e-3", "")
    assert parse_recipe(text, overrides=["training.optimizer.lr=1e-3"]).fingerprint == parse_recipe(RECIPE).fingerprint


def test_all_wrong_overrides_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as error:
        parse_recipe(RECIPE, overrides=["a", "modifiers.9.nu=1", "training.epochs=[1"])
    assert [problem.source for problem in error.value.problems] == [
        "--set a",
        "--set modifiers.9.nu=1",
        "--set training.epochs=[1",
    ]


def test_overrides_of_a_file_that_is_no_mapping_leave_its_mistake() -> None:
    with pytest.raises(RecipeError, match=r"^recipe:1:1: a recipe is a mapping"):
        parse_recipe("- 1", overrides=["training.epochs=2"])


def test_each_mistake_of_a_file_has_its_line_and_column() -> None:
    text = """\
version: 1
name: a b
model:
  name: bonn_wrn22_16
  num_classes: ten
  args:
    widths: {a: 1}
data: {name: digits, siez: 8}
training:
  epochs: 0
  batch_size: 1.5
  optimizer:
    name: adm
    lr: -1
    lr_by_role: {modulaton: 1}
  schedule: {name: cosine, wamup_epochs: 2}
modifiers:
  - {type: binarize, targets: [3, conv1], bound: big}
  - {type: kernel_loss, lamda: 1e-3, nu: 1e-2}
  - {type: feature_los}
"""
    with pytest.raises(RecipeError) as error:
        parse_recipe(text, "r.yaml")
    places = [f"{problem.line}:{problem.column}" for problem in error.value.problems]
    assert places == [
        "2:7", "5:16", "7:5", "8:22", "10:11", "11:15", "13:11", "14:9", "15:18", "16:28", "18:32", "18:50", "19:25",
        "20:12",
    ]  # fmt: skip
    assert str(error.value).count("\n") == len(places) - 1
    assert all(problem.source == "r.yaml" for problem in error.value.problems)


def test_a_recipe_cannot_be_changed() -> None:
    recipe = parse_recipe(RECIPE)
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"  # type: ignore[misc]


def problems_of(text: str, *overrides: str) -> str:
    """Return the mistakes, as they would be printed; nothing for a recipe, which then comes back from its dump."""
    try:
        recipe = parse_recipe(text, overrides=overrides)
    except RecipeError as error:
        return str(error)
    assert parse_recipe(dump_recipe(recipe)).fingerprint == recipe.fingerprint
    return ""


SNIPPETS = st.sampled_from(
    [
        *"{}[]:,-#&*!|>'\"%@`~?\\\n\t ",
        "\r\n", "\x00", "\x85", "\u2028", "\ufeff", "\ud7ff", "---\n", "...\n", "- ", ": ", "? ", "<<: ", "&a ", "*a",
        "!!int ", "!t ", "\"\\x00\"", "\"\\ud800\"", "\"\\U00110000\"", "1e999", "-.inf", ".nan", "null", "true",
        "0x", "0o8", "9" * 30, "[" * 20, "{a: " * 20, "version", "modifiers", "type: binarize", "%YAML 9.9\n", "'re:('",
    ]
)  # fmt: skip


@FUZZ
@given(st.data())
def test_a_damaged_recipe_is_a_recipe_or_a_recipe_error(data: st.DataObject) -> None:
    text = RECIPE
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        length = data.draw(st.integers(0, 12))
        new = data.draw(st.one_of(SNIPPETS, st.text(max_size=4)))
        text = text[:start] + new + text[start + length :]
    for line in problems_of(text).split("\n"):
        assert not line or line.startswith("recipe")
        line.encode()


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(["digits", "re:("])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=4,
)
PLACES = [
    "version", "name", "model", "model.name", "model.num_classes", "model.args", "model.args.depth", "model.init_from",
    "data", "data.name", "data.size", "training", "training.epochs", "training.optimizer", "training.optimizer.name",
    "training.optimizer.lr_by_role", "training.schedule", "training.schedule.milestones", "training.clip_grad",
    "modifiers", "modifiers.0", "modifiers.0.type", "modifiers.0.targets", "modifiers.1.lambda", "modifiers.1.end",
]  # fmt: skip


@FUZZ
@given(place=st.sampled_from(PLACES), value=VALUES)
def test_any_value_at_any_place_is_a_recipe_or_a_recipe_error(place: str, value: Any) -> None:
    override = f"{place}={json.dumps(value)}"
    for line in problems_of(RECIPE, override).split("\n"):
        assert not line or line.startswith((f"--set {override}: ", "recipe:"))
