"""Recipes and checkpoints broken by chance; benchmarks/fuzz.py does the same in great numbers."""

from __future__ import annotations

import random
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bonn_plugin import Session, parse_recipe, save_packed
from bonn_plugin.checkpoint import load_state
from bonn_plugin.errors import CheckpointError
from bonn_plugin.recipe import Recipe, RecipeError, dump_recipe, recipe_model
from bonn_plugin.shipped import shipped_recipes
from bonn_plugin.train import STATE, Runner
from tests.conftest import TINY
from tests.fuzzing import BrokenCheckpoints, bomb, broken_recipe, damage, nested, parsed
from tests.test_resume import Silent

WHOLE = [path.read_text() for path in shipped_recipes().values()] + [TINY]
FEW = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def check(text: str) -> None:
    """Assert that a text gives a recipe, or an error whose lines are short, in under a second of processor time."""
    began = time.process_time()
    found = parsed(text)
    assert time.process_time() - began < 1
    if isinstance(found, Recipe):
        assert parse_recipe(dump_recipe(found)) == found
    else:
        assert isinstance(found, RecipeError)
        assert found.problems


@FEW
@given(st.text(max_size=400))
def test_any_text_is_a_recipe_or_an_error(text: str) -> None:
    check(text)


@FEW
@given(st.randoms(use_true_random=False))
def test_a_broken_recipe_is_a_recipe_or_an_error(rng: random.Random) -> None:
    check(broken_recipe(rng, WHOLE))


@pytest.mark.parametrize("make", [bomb, nested])
def test_bombs_and_deep_nesting_take_no_memory(make: object) -> None:
    assert callable(make)
    for seed in range(20):
        text = make(random.Random(seed))
        tracemalloc.start()
        check(text)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 64 * 2**20


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> BrokenCheckpoints:
    place = tmp_path_factory.mktemp("broken")
    recipe = parse_recipe(TINY)
    torch.manual_seed(0)
    session = Session(recipe, 1)
    session.prepare(recipe_model(recipe))
    save_packed(session.convert(), place / "whole", recipe)
    return BrokenCheckpoints(place / "whole", place)


def test_a_broken_checkpoint_is_refused_or_gives_the_same_logits(broken: BrokenCheckpoints) -> None:
    found = [broken.attempt(random.Random(f"test/{seed}")) for seed in range(120)]
    assert set(found) == {"refused", "the same"}
    assert found.count("refused") > 60


def test_a_broken_training_state_is_refused_or_the_same(tmp_path: Path) -> None:
    text = TINY.replace("epochs: 3", "epochs: 1")
    Runner(parse_recipe(text), tmp_path, torch.device("cpu"), Silent()).train(resume=False)
    content = (tmp_path / STATE).read_bytes()
    whole = load_state(tmp_path / STATE)["model"]
    refused = 0
    for seed in range(100):
        (tmp_path / "broken.pt").write_bytes(damage(random.Random(seed), content))
        try:
            state = load_state(tmp_path / "broken.pt")
        except CheckpointError:
            refused += 1
        else:
            assert all(torch.equal(tensor, whole[name]) for name, tensor in state["model"].items())
    assert refused > 60
