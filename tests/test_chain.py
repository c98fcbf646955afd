"""Chains: a run that starts from another recipe's run, which is trained before it."""

import json

import pytest
import torch

from bonn_plugin import Session, load_packed, load_recipe, parse_recipe
from bonn_plugin.checkpoint import load_state
from bonn_plugin.recipe import RecipeError, earlier_recipes
from bonn_plugin.train import STATE, Quiet, Runner, earlier_runs
from tests.small import Command

FIRST = """version: 1
name: first
model: {name: bonn_wrn22_16, num_classes: 10, args: {depth: 10, widths: [8, 8, 8]}}
data: {name: digits, size: 8}
training:
  epochs: 2
  batch_size: 256
  optimizer: {name: adam, lr: 1e-2}
"""
SECOND = (
    FIRST.replace("name: first", "name: second").replace(
        "num_classes: 10,", "num_classes: 10, init_from: {recipe: first},"
    )
    + "modifiers:\n  - {type: binarize}\n"
)


@pytest.fixture
def bonn(monkeypatch, capsys):
    return Command(monkeypatch, capsys)


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first.yaml").write_text(FIRST)
    (tmp_path / "second.yaml").write_text(SECOND)
    return tmp_path


def test_the_earlier_run_is_trained_first_and_its_weights_are_the_start(recipes, bonn):
    done = bonn("compress", "second.yaml", "--set", "training.epochs=1")
    assert done.status == 0, done.err
    first, second = recipes / "runs/first", recipes / "runs/second"
    assert "nothing is binarised" in (first / "report.md").read_text()
    assert json.loads((first / "report.json").read_text())["accuracy"]["identical_logits"]
    assert load_state(second / STATE)["session"]["epoch"] == 1
    assert load_state(first / STATE)["session"]["epoch"] == 2, "--set is for the last recipe"
    start = load_state(first / STATE)["model"]["conv1.weight"]
    runner = Runner(load_recipe("second.yaml"), recipes / "runs/third", torch.device("cpu"), Quiet())
    assert torch.equal(runner.model.conv1.weight, start)
    load_packed(second)


def test_a_finished_earlier_run_is_left_as_it_is(recipes, bonn):
    bonn("compress", "first.yaml")
    before = (recipes / "runs/first" / STATE).read_bytes()
    done = bonn("compress", "second.yaml", "--set", "training.epochs=1")
    assert "first: finished in runs/first" in done.out
    assert (recipes / "runs/first" / STATE).read_bytes() == before


def test_an_interrupted_earlier_run_goes_on(recipes, bonn, monkeypatch):
    whole = bonn("compress", "first.yaml", "--out", "whole/first")
    assert whole.status == 0
    measure = Runner._save

    def stop(self, *args, **kwargs):
        measure(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "_save", stop)
    stopped = bonn("compress", "second.yaml", "--set", "training.epochs=1")
    assert stopped.status == 130
    assert "in a run that comes before" in stopped.out
    assert "bonn compress second.yaml --out runs/second --set training.epochs=1\n" in stopped.out
    assert load_state(recipes / "runs/first" / STATE)["session"]["epoch"] == 1
    monkeypatch.undo()
    monkeypatch.chdir(recipes)
    (run,) = earlier_runs(load_recipe("second.yaml"), recipes / "runs/second")
    run.complete(torch.device("cpu"), Quiet())
    resumed, straight = (load_state(f / STATE)["model"] for f in (run.folder, recipes / "whole/first"))
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_a_folder_with_another_recipes_run_is_refused_before_any_training(recipes, bonn):
    bonn("compress", "first.yaml")
    (recipes / "first.yaml").write_text(FIRST.replace("lr: 1e-2", "lr: 2e-2"))
    done = bonn("compress", "second.yaml")
    assert done.status == 2
    assert done.lines == [
        "runs/first holds a run of another recipe than first.yaml: move it away, or put the new run elsewhere by --out"
    ]


def test_the_last_folder_is_looked_at_before_the_first_run_trains(recipes, bonn):
    (recipes / "runs/second/training").mkdir(parents=True)
    (recipes / "runs/second" / STATE).write_bytes(b"")
    done = bonn("compress", "second.yaml")
    assert done.status == 2
    assert "holds a run already" in done.err
    assert not (recipes / "runs/first").exists()


def test_the_folder_of_the_earlier_run_cannot_be_that_of_the_last(recipes, bonn):
    done = bonn("compress", "second.yaml", "--out", "runs/first")
    assert done.lines == ["runs/first is the folder of first, which second needs: choose another by --out"]


def test_check_shows_the_chain_and_validates_it(recipes, bonn):
    assert "before it: first, 2 epochs" in bonn("check", "second.yaml").out
    (recipes / "first.yaml").write_text(FIRST.replace("epochs", "epoch"))
    done = bonn("check", "second.yaml")
    assert done.status == 2
    assert "second.yaml:3:" in done.err
    assert "first.yaml:6:3: unknown key 'epoch'" in done.err


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("{recipe: frist}", "frist: no such file, nor a shipped recipe"),
        ("{recipe: second}", "the recipes lead in a circle: second -> second"),
        ("{recipes: first}", "unknown key 'recipes' in init_from"),
        ("{}", "missing key 'recipe' in init_from"),
        ("{recipe: 3}", "must be a valid string"),
        ("3", "must be a valid string"),
    ],
)
def test_a_broken_reference_is_one_line_with_its_place(recipes, bonn, reference, said):
    (recipes / "second.yaml").write_text(SECOND.replace("{recipe: first}", reference))
    done = bonn("check", "second.yaml")
    assert done.status == 2
    assert said in done.err
    assert all(line.startswith("second.yaml:3:") for line in done.lines)


def test_a_circle_of_two_a_chain_too_deep_and_two_runs_of_one_name_are_errors(recipes):
    (recipes / "first.yaml").write_text(
        SECOND.replace("name: second", "name: first").replace("recipe: first", "recipe: second")
    )
    with pytest.raises(RecipeError, match="circle: second -> first -> second"):
        earlier_recipes(load_recipe("second.yaml"))
    for i in range(6):
        (recipes / f"r{i}.yaml").write_text(
            SECOND.replace("name: second", f"name: r{i}").replace("recipe: first", f"recipe: r{i + 1}")
        )
    (recipes / "r6.yaml").write_text(FIRST)
    with pytest.raises(RecipeError, match="more than 4 runs behind each other"):
        earlier_recipes(load_recipe("r0.yaml"))
    assert [r.name for r in earlier_recipes(load_recipe("r3.yaml"))] == ["first", "r5", "r4"]
    (recipes / "first.yaml").write_text(FIRST.replace("name: first", "name: second"))
    with pytest.raises(RecipeError, match="have the same name 'second'"):
        earlier_recipes(load_recipe("second.yaml"))


def test_the_checkpoint_of_a_chain_is_read_and_evaluated_without_the_earlier_recipe(
    recipes, bonn, tmp_path_factory, monkeypatch
):
    bonn("compress", "second.yaml", "--set", "training.epochs=1")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (recipes / "runs/second").rename(elsewhere / "moved")
    monkeypatch.chdir(elsewhere)
    assert bonn("evaluate", "moved").status == 0
    assert bonn("verify", "moved").status == 0


def test_a_recipe_from_text_looks_for_the_earlier_one_in_the_current_folder(recipes):
    recipe = parse_recipe(SECOND)
    assert [r.name for r in earlier_recipes(recipe)] == ["first"]
    Session(recipe, 1)


def test_a_teacher_that_is_missing_is_told_before_the_first_run_trains(recipes, bonn):
    teacher = "  - {type: distill, teacher: {name: resnet18, weights: nowhere.safetensors}}\n"
    (recipes / "second.yaml").write_text(SECOND + teacher)
    done = bonn("compress", "second.yaml")
    assert done.lines == ["second.yaml:11:56: nowhere.safetensors: can't be read: No such file or directory"]
    assert not (recipes / "runs").exists()


def test_everything_before_and_after_binarising_goes_into_one_recipe(recipes, bonn):
    text = (
        SECOND.partition("modifiers:")[0].replace("second", "all")
        + """modifiers:
  - {type: channel_prune, ratio: 0.25}
  - {type: binarize, threshold: always}
  - {type: kernel_loss, lambda: 1e-3, nu: 1e-3}
  - {type: distill, teacher: {recipe: first}, task_weight: 0.5}
  - {type: magnitude_prune, sparsity: 0.5}
  - {type: filter_merge, keep: 0.5}
"""
    )
    (recipes / "all.yaml").write_text(text)
    assert "before it: first" in bonn("check", "all.yaml").out
    done = bonn("compress", "all.yaml")
    assert done.status == 0, done.err
    assert done.out.count("first: packed in runs/first") == 1, "start and teacher are one run"
    report = json.loads((recipes / "runs/all/report.json").read_text())
    assert report["accuracy"]["identical_logits"]
    assert {row["after"] for row in report["pruned"]} == {6}
    assert "sparsity mask" in {row["role"] for row in report["roles"]}
    assert report["merging"]
    assert bonn("verify", "runs/all").status == 0
    record = json.loads((recipes / "runs/all/training/metrics.jsonl").read_text().splitlines()[-1])
    assert {"task", "kernel", "distill"} <= set(record["loss"])
