"""What README and docs show works as it stands there."""

import re
from pathlib import Path

import pytest
import torch

from bonn_plugin import cli, parse_recipe
from bonn_plugin.modifiers import registered_modifiers
from bonn_plugin.recipe import DetectionModelConfig
from bonn_plugin.recipe.data import DATA_CONFIGS

ROOT = Path(__file__).parent.parent


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def test_the_readmes_training_loop_trains_and_saves(tmp_path, monkeypatch):
    (code,) = [b for b in blocks("README.md", "python") if "session.step()" in b]
    code = code.replace('"recipes/', f'"{ROOT}/recipes/').replace("load_recipe(", "load_recipe(")
    code = re.sub(
        r'(load_recipe\("[^"]+")',
        r'\1, ["training.epochs=2", "modifiers.kernel_loss.start=1", '
        r'"modifiers.kernel_loss.end=2", "training.schedule.warmup_epochs=0"]',
        code,
    )
    monkeypatch.chdir(tmp_path)
    loader = [(torch.randn(4, 3, 16, 16), torch.tensor([1, 2, 3, 4]))] * 2
    exec(compile(code, "README.md", "exec"), {"loader": loader})
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_readmes_recipe_is_the_shipped_one():
    (text,) = [block for block in blocks("README.md", "yaml") if "version: 1" in block]
    shown, shipped = parse_recipe(text), parse_recipe((ROOT / "recipes" / "imagenet_resnet18.yaml").read_text())
    assert shown.modifiers == shipped.modifiers
    assert shown.training == shipped.training


def test_the_modifier_in_the_docs_can_be_registered_and_used():
    (code,) = blocks("docs/recipes.md", "python")
    exec(compile(code, "docs/recipes.md", "exec"), {"__name__": "docs"})
    assert "weight_norm" in registered_modifiers()


@pytest.mark.parametrize("command", ["check", "compress", "evaluate", "verify", "report", "compare", "recipes"])
def test_every_command_that_the_readme_names_exists(command):
    assert f"bonn {command}" in (ROOT / "README.md").read_text()
    assert command in {c.name or c.callback.__name__ for c in cli.app.registered_commands}


@pytest.mark.parametrize("config", [*DATA_CONFIGS.values(), DetectionModelConfig])
def test_the_docs_name_every_key_of_the_data_sets_and_of_detectors(config):
    table = (ROOT / "docs" / "recipes.md").read_text()
    for key in set(config.model_fields) - {"name"}:
        assert f"`{key}`" in table


def test_the_docs_name_every_modifier_and_its_keys():
    table = (ROOT / "docs" / "recipes.md").read_text()
    for name, registration in registered_modifiers().items():
        if registration.modifier.__module__.startswith("bonn_plugin."):
            assert f"| `{name}` |" in table
            for key, field in registration.config.model_fields.items():
                assert key == "type" or f"`{field.alias or key}`" in table, (name, key)


def test_every_test_that_the_paper_map_names_exists():
    tests = "\n".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", (ROOT / "docs" / "paper_map.md").read_text()):
        assert f"def {name}(" in tests, name
