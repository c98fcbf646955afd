"""Bad input of every kind through the real command: one line for one mistake, status 2, nothing lost."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from bonn_plugin.checkpoint import _digest
from bonn_plugin.files import sha256
from tests.small import RECIPE, Command, Result, contents, run_here


@pytest.fixture
def bonn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    return Command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with its recipe beside it. Nobody writes into it: tests take a copy."""
    place = tmp_path_factory.mktemp("good")
    (place / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        assert run_here(patch, "compress", place / "recipe.yaml", "--out", place / "run", "--device", "cpu") == 0
    return place


@pytest.fixture
def run(good: Path, tmp_path: Path) -> Path:
    """A copy of the finished run: the checkpoint folder."""
    shutil.copytree(good / "run", tmp_path / "run")
    return tmp_path / "run"


def refused(result: Result, *parts: str, lines: int = 1) -> None:
    """Assert that ``result`` is one line (or ``lines``) with all of ``parts``, and status 2."""
    assert result.status == 2, result
    assert len(result.lines) == lines, result.err
    assert "Traceback" not in result.out + result.err
    for part in parts:
        assert part in result.err, f"{part!r} is not in {result.err!r}"


# --- recipes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """A mistake in a recipe: ``new`` in the place of ``old``; ``@@`` in ``new`` marks the place to be named."""

    mistake: str
    old: str
    new: str
    says: tuple[str, ...]

    def apply(self) -> tuple[str, str]:
        """Return the text and the line:column of the mark."""
        assert RECIPE.count(self.old) == 1
        marked = RECIPE.replace(self.old, self.new)
        before = marked[: marked.index("@@")]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        return marked.replace("@@", ""), f"{line}:{column}"


def edit(mistake: str, old: str, new: str, *says: str) -> Any:
    return pytest.param(Edit(mistake, old, new, says), id=mistake.replace(" ", "-"))


MODIFIERS = RECIPE[RECIPE.index("modifiers:") :]
BINARIZE = MODIFIERS.splitlines()[1]
KERNEL_LOSS = MODIFIERS.splitlines()[2]

RECIPES = [
    # keys
    edit("typo in a key at the top", "training:", "@@trainig:", "'trainig'", "Did you mean 'training'?"),
    edit("typo in a key of model", "num_classes", "@@num_clases", "'num_clases' in model", "'num_classes'?"),
    edit("typo in a key of data", "size: 8", "@@siez: 8", "'siez' in data", "'size'?"),
    edit("typo in a key of training", "batch_size", "@@batchsize", "'batchsize' in training", "'batch_size'?"),
    edit("typo in a key of the optimizer", "lr:", "@@lrr:", "'lrr' in optimizer", "'lr'?"),
    edit("typo in a key of the schedule", "{name: constant}", "{name: constant, @@warmup: 1}", "'warmup_epochs'?"),
    edit("typo in a key of a modifier", "lambda", "@@lamda", "'lamda' in kernel_loss", "'lambda'?"),
    edit("key of another data set", "size: 8", "size: 8, @@root: /data", "'root' in data"),
    edit("duplicate key", "  epochs: 1", "  epochs: 1\n  @@epochs: 2", "duplicate key 'epochs'"),
    edit("key that is a list", "size: 8", "@@[size]: 8", "a key must be a word"),
    edit("missing key of the optimizer", "{name: adam, lr: 1e-3}", "@@{name: adam}", "missing key 'lr' in optimizer"),
    edit("missing type of a modifier", "{type: kernel_loss,", "@@{", "missing key 'type'", "binarize"),
    edit("missing name of the data set", "{name: digits,", "@@{", "missing key 'name'", "cifar10, cifar100, coco"),
    # names
    edit("unknown network", "bonn_wrn22_16", "@@bonn_wrn22_61", "'bonn_wrn22_61'", "Did you mean", "'bonn_wrn22_16'"),
    edit("unknown data set", "digits", "@@digist", "unknown data set 'digist'", "Did you mean 'digits'"),
    edit("unknown optimizer", "adam", "@@adm", "'adm'", "Did you mean 'adam'"),
    edit("optimizer of second order", "{name: adam,", "@@{name: adahessian,", "'adahessian'", "second derivatives"),
    edit("unknown schedule", "constant", "@@cosin", "'cosin'", "Did you mean 'cosine'"),
    edit("unknown modifier", "type: kernel_loss", "type: @@kernel_los", "'kernel_los'", "Did you mean 'kernel_loss'"),
    edit("name that leads out of the folder", "name: small", "name: @@../../small", "name must match", "'../../small'"),
    # types and ranges
    edit("version that is not known", "version: 1", "version: @@2", "recipe version 2 is not known"),
    edit("version that is a string", "version: 1", "version: @@'1'", "recipe version '1' is not known"),
    edit("number that is a string", "epochs: 1", "epochs: @@'1'", "epochs must be a valid integer, not '1'"),
    edit("fraction for a whole number", "epochs: 1", "epochs: @@1.5", "epochs must be a valid integer, not 1.5"),
    edit("true for a number", "epochs: 1", "epochs: @@true", "epochs must be a valid integer, not True"),
    edit("yes for true", "digits, size: 8", "cifar10, root: x, flip: @@yes", "must be a valid boolean, not 'yes'"),
    edit("no for false", "digits, size: 8", "cifar10, root: x, flip: @@no", "must be a valid boolean, not 'no'"),
    edit("number for a name", "name: small", "name: @@12", "name must be a valid string, not 12"),
    edit("no epochs", "epochs: 1", "epochs: @@0", "epochs must be greater than or equal to 1, not 0"),
    edit("negative learning rate", "lr: 1e-3", "lr: @@-1e-3", "lr must be greater than 0, not -0.001"),
    edit("rate that is not a number", "lr: 1e-3", "lr: @@.nan", "lr must be a finite number, not nan"),
    edit("infinite weight of a loss", "lambda: 1e-3", "lambda: @@.inf", "lambda must be a finite number, not inf"),
    edit("rate beyond all floats", "lr: 1e-3", "lr: @@1e999", "lr must be a finite number, not inf"),
    edit("rate beyond float32", "lr: 1e-3", "lr: @@1e300", "lr is larger than 1e+30, not 1e+300"),
    edit("role's rate beyond float32", "lr: 1e-3", "lr: 1e-3, lr_by_role: {weight: @@1e300}", "larger than 1e+30"),
    edit("setting of a modifier beyond float32", "nu: 1e-2", "nu: 1e-2, sigma_floor: @@1e300", "larger than 1e+30"),
    edit("null for a number", "epochs: 1", "epochs: @@null", "epochs must be a valid integer, not None"),
    edit("word for a mapping", "{name: constant}", "@@constant", "schedule", "not 'constant'"),
    edit("list for a mapping", "{name: digits, size: 8}", "@@[digits, 8]", "a data set is a mapping"),
    edit("mapping for the list of modifiers", MODIFIERS, "modifiers: @@{type: binarize}\n", "modifiers is a list"),
    edit("modifier that is a word", KERNEL_LOSS, "  - @@kernel_loss", "a modifier is a mapping"),
    edit("no targets", r"['re:layer[1-3]\.\d\.conv[12]']", "@@[]", "targets must have at least 1 item"),
    edit("target that is a number", r"['re:layer[1-3]\.\d\.conv[12]']", "[@@7]", "targets.0 must be a valid string"),
    edit("one class", "num_classes: 10", "num_classes: @@1", "num_classes must be greater than or equal to 2"),
    # what does not fit together
    edit("classes that the data has not", "num_classes: 10", "num_classes: @@7", "'digits' has 10 classes"),
    edit("window beyond the training", "nu: 1e-2", "nu: 1e-2, end: @@5", "end 5 lies after the training", "1 epochs"),
    edit("window that is empty", "nu: 1e-2", "nu: 1e-2, start: @@1", "has 0 epochs; kernel_loss needs at least 1"),
    edit("window too short", KERNEL_LOSS, "  - @@{type: feature_loss, theta: 1e-3}", "feature_loss needs at least 2"),
    edit(
        "milestones beyond the training",
        "{name: constant}",
        "{name: multistep, milestones: @@[3]}",
        "milestone 3 lies after the training",
    ),
    edit(
        "milestones that fall",
        "epochs: 1\n  batch_size: 256\n  optimizer: {name: adam, lr: 1e-3}\n  schedule: {name: constant}",
        "epochs: 9\n  batch_size: 256\n  optimizer: {name: adam, lr: 1e-3}\n"
        "  schedule: {name: multistep, milestones: @@[4, 2]}",
        "milestones must rise",
    ),
    edit("multistep without milestones", "{name: constant}", "@@{name: multistep}", "needs milestones"),
    edit("step without every", "{name: constant}", "@@{name: step}", "needs 'every'"),
    edit("warm-up that leaves nothing", "{name: constant}", "{name: constant, warmup_epochs: @@1}", "leaves nothing"),
    edit(
        "key without meaning for the schedule",
        "{name: constant}",
        "{name: cosine, gamma: @@0.5}",
        "'gamma' has no meaning for schedule 'cosine'",
    ),
    edit("kernel loss without binarize", BINARIZE + "\n" + KERNEL_LOSS, "  - @@" + KERNEL_LOSS[4:], "needs a binarize"),
    edit("bound of a gradient that has none", "expect: 6", "ste: polynomial, bound: @@2.0", "a fixed bound of 1"),
    edit("unknown gradient", "expect: 6", "ste: @@clipp", "must be 'clip'", "not 'clipp'", "Did you mean 'clip'?"),
    edit(
        "precision that the device has not",
        "batch_size: 256",
        "batch_size: 256\n  amp: @@float16",
        "float16 trains on a GPU alone",
    ),
    edit("batch larger than the data set", "batch_size: 256", "batch_size: @@5000", "smaller than one batch", "lower"),
    edit(
        "rate of a role that nothing has",
        "lr: 1e-3",
        "lr: 1e-3, lr_by_role: {@@threshold: 0.1}",
        "no parameter has the role 'threshold'",
    ),
    edit(
        "rate of an unknown role",
        "lr: 1e-3",
        "lr: 1e-3, lr_by_role: {@@modulaton: 0.1}",
        "modulaton",
        "Did you mean 'modulation'?",
    ),
    # selectors
    edit(
        "selector that matches nothing",
        r"'re:layer[1-3]\.\d\.conv[12]'",
        r"@@'layer1.0.cnv1'",
        "matches no convolution",
        "Did you mean 'layer1.0.conv1'",
    ),
    edit(
        "pattern that matches nothing",
        r"['re:layer[1-3]\.\d\.conv[12]']",
        r"[@@'re:leyer[1-3]\.\d\.conv[12]']",
        "matches no convolution",
        "Did you mean 'layer",
    ),
    edit("selector of another kind of module", r"'re:layer[1-3]\.\d\.conv[12]'", "@@fc", "fc can't be", "Linear"),
    edit("pattern that is none", r"'re:layer[1-3]\.\d\.conv[12]'", "@@'re:layer['", "not a regular expression"),
    edit("pattern too large", r"'re:layer[1-3]\.\d\.conv[12]'", "@@'re:a{99999999999}'", "not a regular expression"),
    edit("pattern of two readings", r"'re:layer[1-3]\.\d\.conv[12]'", "@@'re:layer[1--3]'", "set difference"),
    edit("unknown kind of selector", r"'re:layer[1-3]\.\d\.conv[12]'", "@@'glob:layer*'", "selector kind 'glob'"),
    edit("unknown class of module", r"'re:layer[1-3]\.\d\.conv[12]'", "@@'class:Conv3d'", "convolutions are: Conv2d"),
    edit("another count of matches", "expect: 6", "expect: @@18", "expected 18 convolutions, the selectors match 6"),
    edit(
        "binarising twice",
        KERNEL_LOSS,
        "  - {type: binarize, targets: @@[layer1.0.conv1]}",
        "layer1.0.conv1 is binarised already",
    ),
    # arguments of the network
    edit("argument that the network does not take", "args: {", "args: @@{dept: 10, ", "can't be built", "dept"),
    edit("argument that makes no sense", "args: {widths: [8, 8, 8], depth: 10}", "args: @@{depth: 11}", "not 6n + 4"),
    edit("network without channels", "args: {", "args: @@{in_chans: 0, ", "can't be built", "zero-element"),
    edit("argument that stands elsewhere", "args: {", "args: @@{num_classes: 3, ", "'num_classes' is no network"),
    edit("argument that is a mapping", "args: {", "args: @@{drop_rate: {a: 1}, ", "'drop_rate' must be a number"),
    edit("argument that is infinite", "args: {", "args: @@{drop_rate: .inf, ", "'drop_rate' must be a number"),
    edit(
        "channels that the images have not",
        "model: {name: bonn_wrn22_16, num_classes: 10, args: {",
        "model: @@{name: bonn_wrn22_16, num_classes: 10, args: {in_chans: 1, ",
        "does not take the images of the data set",
        "(3, 8, 8)",
    ),
    edit(
        "batch of one where a norm needs two",
        RECIPE[RECIPE.index("model:") : RECIPE.index("  optimizer:")],
        "model: @@{name: bonn_resnet18, num_classes: 10}\ndata: {name: digits, size: 8}\n"
        "training:\n  epochs: 1\n  batch_size: 1\n",
        "does not take",
        "in batches of 1",
        "more than 1 value per channel",
    ),
    # start weights
    edit("start weights that are missing", "num_classes", "init_from: @@no/such, num_classes", "No such file"),
    # YAML
    edit("tag", "epochs: 1", "epochs: @@!!int 1", "tags are not supported"),
    edit("tag that would run code", "epochs: 1", "epochs: @@!!python/object/apply:os.system [ls]", "tags"),
    edit("anchor and alias", "epochs: 1", "epochs: @@&n 1", "anchors and aliases are not supported"),
    edit("second document", MODIFIERS, MODIFIERS + "@@---\nversion: 1\n", "a second document"),
    edit("bracket that stays open", "size: 8}\ntraining:", "size: 8\ntraining@@:", "not YAML"),
    edit("tab for indentation", "  epochs: 1", "@@\tepochs: 1", "not YAML"),
    edit("character beyond Unicode", "name: small", 'name: "\\U@@FFFFFFFF"', "not YAML"),
    edit("half a character", "name: digits", 'name: @@"\\uD800"', "control character"),
    edit("zero byte in a string", "name: digits", 'name: @@"a\\0b"', "control character"),
    edit("zero byte in the file", "name: digits", "name: a@@\0b", "not YAML"),
    edit("nested too deep", "depth: 10", "depth: " + "[" * 13 + "@@" + "[" * 3 + "]" * 16, "deeper than 16 levels"),
]


@pytest.mark.parametrize("mistake", RECIPES)
def test_a_mistake_in_a_recipe_is_one_line_with_its_place(mistake: Edit, bonn: Command, tmp_path: Path) -> None:
    text, place = mistake.apply()
    (tmp_path / "recipe.yaml").write_text(text)
    refused(bonn("compress", "recipe.yaml", "--out", "run", "--device", "cpu"), f"recipe.yaml:{place}: ", *mistake.says)
    assert not (tmp_path / "run").exists()


def test_mistakes_of_a_recipe_are_told_all_at_once(bonn: Command, tmp_path: Path) -> None:
    text = RECIPE
    wrong = {"num_classes": "num_clases", "digits": "digist", "epochs: 1": "epochs: 0", "lambda": "lamda"}
    wrong |= {"adam": "adm", "constant": "constnat", "expect: 6": "expect: six"}
    for old, new in wrong.items():
        text = text.replace(old, new)
    (tmp_path / "recipe.yaml").write_text(text)
    result = bonn("check", "recipe.yaml")
    refused(result, "num_clases", "digist", "epochs", "lamda", "adm", "constnat", "six", lines=7)
    places = [tuple(map(int, line.split(":")[1:3])) for line in result.lines]
    assert places == sorted(places)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda f: f.write_text(""), "the file is empty"),
    "only a comment": (lambda f: f.write_text("# nothing\n"), "the file is empty"),
    "a list": (lambda f: f.write_text("- 1\n"), "a recipe is a mapping"),
    "a word": (lambda f: f.write_text("recipe\n"), "a recipe is a mapping"),
    "binary": (lambda f: f.write_bytes(bytes(range(256))), "not a text file in UTF-8"),
    "a picture": (lambda f: Image.new("RGB", (4, 4)).save(f, "PNG"), "not a text file in UTF-8"),
    "huge": (lambda f: f.write_text("name: " + "x" * 5_000_000), "longer than 100,000 characters"),
    "a folder": (lambda f: f.mkdir(), "is a folder"),
    "missing": (lambda f: None, "no such file, nor a shipped recipe"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_recipe_is_refused(kind: str, bonn: Command, tmp_path: Path) -> None:
    make, says = FILES[kind]
    make(tmp_path / "recipe.yaml")
    refused(bonn("compress", "recipe.yaml"), "recipe.yaml", says)


def test_a_misspelt_shipped_recipe_is_corrected(bonn: Command) -> None:
    refused(bonn("check", "digits_wrn22_61"), "Did you mean 'digits_wrn22_16'")


def test_a_recipe_name_longer_than_any_path_is_refused(bonn: Command) -> None:
    refused(bonn("check", "x" * 5000), "x" * 5000 + ": ")


OVERRIDES = {
    "no equals sign": ("training.epochs", "needs the form KEY=VALUE"),
    "no key": ("=3", "needs the form KEY=VALUE"),
    "unknown key": ("training.epoch=3", "unknown key 'epoch' in training. Did you mean 'epochs'?"),
    "unknown section": ("trainng.epochs=3", "unknown key 'trainng' in the recipe. Did you mean 'training'?"),
    "wrong type": ("training.epochs=three", "epochs must be a valid integer, not 'three'"),
    "no value": ("training.epochs=", "epochs must be a valid integer, not ''"),
    "not YAML": ("training.epochs=[1", "not YAML"),
    "keys of a number": ("training.epochs.x=1", "training.epochs has no keys"),
    "number of a modifier that is not there": ("modifiers.7.nu=1", "there is no entry 7: the list has 2"),
    "number in other digits": ("modifiers.².nu=1", "0 modifiers have the type '²'"),
    "type of a modifier that is not there": ("modifiers.kernel_los.nu=1", "Did you mean 'kernel_loss'?"),
    "value that does not fit": ("modifiers.kernel_loss.end=9", "end 9 lies after the training"),
}


@pytest.mark.parametrize("kind", OVERRIDES)
def test_a_wrong_override_is_one_line_that_names_it(kind: str, bonn: Command, tmp_path: Path) -> None:
    override, says = OVERRIDES[kind]
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    refused(bonn("check", "recipe.yaml", "--set", override), f"--set {override}: ", says)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.optimizer.name=adm", "Did you mean 'adam'"),
        ("training.batch_size=5000", "smaller than one batch"),
        ("model.name=bonn_wrn22", "'bonn_wrn22_16'"),
        ("model.init_from=nowhere", "No such file"),
        ("data.size=4", "size must be greater than or equal to 8"),
        ("data.name=cifar", "Did you mean 'cifar10'"),
        ("training={epochs: 1}", "missing key 'batch_size' in training"),
    ],
)
def test_what_an_override_breaks_later_names_it_too(override: str, says: str, bonn: Command, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    result = bonn("compress", "recipe.yaml", "--set", override)
    refused(result, says, lines=len(result.lines))
    assert all(line.startswith(f"--set {override}: ") for line in result.lines)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["compress", "--epochs", "3"], "No such option"),
        (["compress"], "Missing argument"),
        (["train", "recipe.yaml"], "No such command"),
    ],
)
def test_a_command_line_that_is_none_is_refused(args: list[str], says: str, bonn: Command) -> None:
    result = bonn(*args)
    assert result.status == 2
    assert says in result.err
    assert "Traceback" not in result.err


# --- data ----------------------------------------------------------------------------------------


def folder_recipe(place: Path, data: str) -> None:
    (place / "recipe.yaml").write_text(RECIPE.replace("{name: digits, size: 8}", data))


def picture(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)).save(file)


def no_train(root: Path) -> None:
    picture(root / "val" / "cat" / "1.png")


def no_val(root: Path) -> None:
    picture(root / "train" / "cat" / "1.png")


def no_classes(root: Path) -> None:
    (root / "train").mkdir(parents=True)


def empty_class(root: Path) -> None:
    picture(root / "train" / "cat" / "1.png")
    (root / "train" / "dog").mkdir()


def other_classes(root: Path) -> None:
    picture(root / "train" / "cat" / "1.png")
    picture(root / "val" / "dog" / "1.png")


def too_few_classes(root: Path) -> None:
    for part in ("train", "val"):
        picture(root / part / "cat" / "1.png")
        picture(root / part / "dog" / "1.png")


FOLDERS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "nothing there": (lambda root: None, ("data/train", "one folder a class", "No such file")),
    "no train": (no_train, ("data/train", "one folder a class")),
    "no val": (no_val, ("data/val", "one folder a class")),
    "no class": (no_classes, ("data/train", "one folder a class")),
    "a class without pictures": (empty_class, ("data/train", "dog")),
    "classes that differ": (other_classes, ("train and val differ in their classes: cat, dog",)),
    "another number of classes": (too_few_classes, ("has 2 classes", "num_classes is 10")),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_picture_folder_that_is_not_one_is_told_with_what_it_should_hold(
    kind: str, bonn: Command, tmp_path: Path
) -> None:
    make, says = FOLDERS[kind]
    make(tmp_path / "data")
    folder_recipe(tmp_path, "{name: imagefolder, root: data, crop: 8}")
    refused(bonn("compress", "recipe.yaml"), "recipe.yaml:4:", *says)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named(workers: int, bonn: Command, tmp_path: Path) -> None:
    for part in ("train", "val"):
        for label in range(10):
            picture(tmp_path / "data" / part / str(label) / "1.png")
    broken = tmp_path / "data" / "train" / "3" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    folder_recipe(tmp_path, f"{{name: imagefolder, root: data, crop: 8, workers: {workers}}}")
    result = bonn("compress", "recipe.yaml", "--set", "training.batch_size=10")
    refused(result, "data/train/3/1.png", "not a picture, or damaged")


@pytest.mark.parametrize(("name", "inner"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_a_missing_cifar_is_told_with_what_the_folder_should_hold(
    name: str, inner: str, bonn: Command, tmp_path: Path
) -> None:
    folder_recipe(tmp_path, f"{{name: {name}, root: data}}")
    count = "num_classes: 100" if name == "cifar100" else "num_classes: 10"
    file = tmp_path / "recipe.yaml"
    file.write_text(file.read_text().replace("num_classes: 10", count))
    refused(bonn("compress", "recipe.yaml"), "recipe.yaml:4:", f"no intact {name} in data", inner, "test")


def test_a_damaged_cifar_file_is_never_unpickled(bonn: Command, tmp_path: Path) -> None:
    inner = tmp_path / "data" / "cifar-10-batches-py"
    inner.mkdir(parents=True)
    trap = b"cos\nmkdir\n(S'sprung'\ntR."  # a pickle that makes a folder where it is loaded
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (inner / name).write_bytes(trap)
    folder_recipe(tmp_path, "{name: cifar10, root: data}")
    refused(bonn("compress", "recipe.yaml"), "no intact cifar10")
    assert not (tmp_path / "sprung").exists()


def test_a_home_that_nobody_has_is_no_traceback(bonn: Command, tmp_path: Path) -> None:
    folder_recipe(tmp_path, "{name: cifar10, root: ~nobody-of-this-name/cifar}")
    refused(bonn("compress", "recipe.yaml"), "no intact cifar10 in ~nobody-of-this-name/cifar")


# --- checkpoints ---------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path, share: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(share * (len(content) - 1))] ^= 0x10
    file.write_bytes(content)


def with_tensors(run: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors and make all checksums right again, so that the check behind them is reached."""
    tensors = safetensors.torch.load_file(run / "model.safetensors")
    change(tensors)
    with_weights(run, safetensors.torch.save(tensors))


def with_weights(run: Path, content: bytes) -> None:
    """Replace the weights' file and make all checksums right again."""
    (run / "model.safetensors").write_bytes(content)
    with_config(run, lambda config: config["sha256"].update({"model.safetensors": sha256(content)}))


def with_config(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change config.json and make its checksum right again."""
    config = json.loads((run / "config.json").read_text())
    del config["self"]
    change(config)
    config["self"] = _digest(config)
    (run / "config.json").write_text(json.dumps(config))


def edited(run: Path) -> None:
    file = run / "config.json"
    file.write_text(file.read_text().replace('"depth": 10', '"depth": 16'))


def zero_points(run: Path) -> None:
    with_tensors(run, lambda t: t["conv1.weight"].zero_())


PACKED = "layer1.0.conv1.weight_packed"
CONV = "layer1.0.conv1"

Damage = Callable[[Path], object]
CHECKPOINTS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    # files
    "folder missing": (lambda r: shutil.rmtree(r), ("run: no such folder",)),
    "weights missing": (lambda r: (r / "model.safetensors").unlink(), ("model.safetensors", "No such file")),
    "configuration missing": (lambda r: (r / "config.json").unlink(), ("config.json: missing", "never finished")),
    "recipe missing": (lambda r: (r / "recipe.yaml").unlink(), ("recipe.yaml", "No such file")),
    "weights empty": (lambda r: (r / "model.safetensors").write_bytes(b""), ("model.safetensors: the checksum",)),
    "weights truncated": (lambda r: truncate(r / "model.safetensors"), ("model.safetensors: the checksum",)),
    "configuration truncated": (lambda r: truncate(r / "config.json"), ("config.json: not JSON",)),
    "recipe truncated": (lambda r: truncate(r / "recipe.yaml"), ("recipe.yaml: the checksum",)),
    "configuration not JSON": (lambda r: (r / "config.json").write_text("model: x"), ("config.json: not JSON",)),
    "configuration nested": (lambda r: (r / "config.json").write_text("[" * 100_000), ("config.json: not JSON",)),
    "configuration a list": (lambda r: (r / "config.json").write_text("[]"), ("not the configuration",)),
    "configuration of something else": (lambda r: (r / "config.json").write_text("{}"), ("not the configuration",)),
    "configuration edited": (edited, ("config.json: the checksum is wrong",)),
    "recipe edited": (lambda r: (r / "recipe.yaml").write_text(RECIPE), ("recipe.yaml: the checksum is wrong",)),
    "later version": (lambda r: with_config(r, lambda c: c.update(version=2)), ("checkpoint version 2", "update")),
    "weights a folder": (
        lambda r: ((r / "model.safetensors").unlink(), (r / "model.safetensors").mkdir()),
        ("model.safetensors: can't be read",),
    ),
    # a pickle in the place of safetensors
    "torch.save for safetensors": (
        lambda r: torch.save({"a": torch.ones(1)}, r / "model.safetensors"),
        ("a pickle, not safetensors", "refused"),
    ),
    **{
        f"pickle of protocol {protocol}": (
            lambda r, p=protocol: (r / "model.safetensors").write_bytes(pickle.dumps({"a": [1.0]}, p)),
            ("a pickle, not safetensors", "refused"),
        )
        for protocol in (2, 3, 4, 5)
    },
    "pickle with the right checksum": (
        lambda r: with_weights(r, pickle.dumps({"a": [1.0]})),
        ("a pickle, not safetensors", "refused"),
    ),
    "nonsense with the right checksum": (lambda r: with_weights(r, b"nonsense" * 9), ("not a safetensors file",)),
    # tensors
    "another shape": (
        lambda r: with_tensors(r, lambda t: t.update({PACKED: torch.zeros(8, 8, dtype=torch.uint8)})),
        (f"tensor '{PACKED}' is torch.uint8 (8, 8)", "(8, 9)"),
    ),
    "another dtype": (
        lambda r: with_tensors(r, lambda t: t.update({"fc.bias": t["fc.bias"].half()})),
        ("tensor 'fc.bias' is torch.float16", "torch.float32"),
    ),
    "tensor missing": (lambda r: with_tensors(r, lambda t: t.pop("fc.bias")), ("tensor 'fc.bias' is missing",)),
    "tensor too many": (
        lambda r: with_tensors(r, lambda t: t.update(more=torch.ones(1))),
        ("tensor 'more' has no place",),
    ),
    "other weights": (zero_points, ("logits of the probe differ", "not what was saved")),
    "weights that are no numbers": (
        lambda r: with_tensors(r, lambda t: t["fc.bias"].fill_(float("nan"))),
        ("logits of the probe differ",),
    ),
    # a configuration that was made by hand, its checksum right
    "unknown network": (
        lambda r: with_config(r, lambda c: c["model"].update(name="bonn_wrn22_61")),
        ("config.json", "no model named 'bonn_wrn22_61'"),
    ),
    "network with an unknown key": (
        lambda r: with_config(r, lambda c: c["model"].update(code="x")),
        ("config.json", "model.code"),
    ),
    "number of classes that is text": (
        lambda r: with_config(r, lambda c: c["model"].update(num_classes="ten")),
        ("config.json", "model.num_classes"),
    ),
    "arguments that the network does not take": (
        lambda r: with_config(r, lambda c: c["model"]["args"].update(depth=11)),
        ("config.json", "not 6n + 4"),
    ),
    "no network": (lambda r: with_config(r, lambda c: c.pop("model")), ("config.json", "model")),
    "no modules": (lambda r: with_config(r, lambda c: c.pop("modules")), ("config.json", "modules")),
    "no checksums": (lambda r: with_config(r, lambda c: c.pop("sha256")), ("config.json", "sha256")),
    "no probe": (lambda r: with_config(r, lambda c: c.pop("probe")), ("config.json", "probe")),
    "modules that are a list": (lambda r: with_config(r, lambda c: c.update(modules=[])), ("config.json", "modules")),
    "module that is a word": (
        lambda r: with_config(r, lambda c: c["modules"].update({CONV: "packed"})),
        ("config.json", "modules", CONV),
    ),
    "module without a kind": (
        lambda r: with_config(r, lambda c: c["modules"][CONV].pop("kind")),
        ("config.json", f"module '{CONV}'"),
    ),
    "module of an unknown kind": (
        lambda r: with_config(r, lambda c: c["modules"][CONV].update(kind="os.system")),
        ("config.json", f"module '{CONV}'", "os.system"),
    ),
    "module that the network has not": (
        lambda r: with_config(r, lambda c: c["modules"].update({"no.such": c["modules"][CONV]})),
        ("config.json", "module 'no.such'"),
    ),
    "module with an impossible geometry": (
        lambda r: with_config(r, lambda c: c["modules"][CONV].update(stride=[0, 1])),
        ("config.json", f"module '{CONV}'", "out of range"),
    ),
    "module too large for any memory": (
        lambda r: with_config(r, lambda c: c["modules"][CONV].update(out_channels=2**50)),
        ("config.json", f"module '{CONV}'"),
    ),
    "checksum of a file outside": (
        lambda r: with_config(r, lambda c: c["sha256"].update({"../secret": "0"})),
        ("config.json", "../secret"),
    ),
    "probe of another shape": (
        lambda r: with_config(r, lambda c: c["probe"].update(shape=[2, 3])),
        ("config.json", "probe.shape"),
    ),
    "probe of other channels": (
        lambda r: with_config(r, lambda c: c["probe"].update(shape=[2, 5, 8, 8])),
        ("config.json", "probe"),
    ),
    "probe that is no number": (
        lambda r: with_config(r, lambda c: c["probe"].update(logits="%%%")),
        ("config.json", "probe"),
    ),
    "probe of other classes": (
        lambda r: with_config(r, lambda c: c["probe"].update(logits="AAAAAA==")),
        ("config.json", "probe"),
    ),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_wrong_checkpoint_is_refused_in_one_line(kind: str, bonn: Command, run: Path) -> None:
    damage, says = CHECKPOINTS[kind]
    damage(run)
    refused(bonn("verify", run), *says)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "recipe.yaml"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.25, 0.5, 0.75, 1.0])
def test_a_flipped_bit_is_found(file: str, share: float, bonn: Command, run: Path) -> None:
    flip(run / file, share)
    refused(bonn("verify", run), f"run/{file}: ")


def test_a_flipped_bit_anywhere_in_the_configuration_is_found(run: Path) -> None:
    from bonn_plugin import load_packed
    from bonn_plugin.errors import CheckpointError

    file = run / "config.json"
    content = file.read_bytes()
    for i in range(0, len(content), 5):
        file.write_bytes(content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :])
        with pytest.raises(CheckpointError) as error:
            load_packed(run)
        assert "\n" not in str(error.value)


def test_evaluate_refuses_a_damaged_checkpoint(bonn: Command, run: Path) -> None:
    flip(run / "model.safetensors", 0.7)
    refused(bonn("evaluate", run), "model.safetensors: the checksum is wrong")


def test_evaluate_refuses_data_of_other_classes(bonn: Command, run: Path, tmp_path: Path) -> None:
    too_few_classes(tmp_path / "data")
    data = "data={name: imagefolder, root: data, crop: 8}"
    refused(bonn("evaluate", run, "--set", data, "--set", "model.num_classes=2"), "2 classes", "10")


def test_report_says_what_writes_it(bonn: Command, run: Path) -> None:
    (run / "report.json").unlink()
    refused(bonn("report", run), "report.json: can't be read", "bonn compress writes it")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2]", b"\xff\xfe", b'{"name": 3}'])
def test_a_report_that_is_none_is_refused(content: bytes, bonn: Command, run: Path) -> None:
    (run / "report.json").write_bytes(content)
    refused(bonn("report", run), "report.json: not a report")


def test_an_unknown_form_of_report_is_refused(bonn: Command, run: Path) -> None:
    refused(bonn("report", run, "--format", "html"), "unknown format 'html': terminal, markdown or json")


# --- runs ----------------------------------------------------------------------------------------


def test_a_run_that_is_there_is_not_overwritten(bonn: Command, good: Path, run: Path) -> None:
    before = contents(run)
    refused(bonn("compress", good / "recipe.yaml", "--out", run), "holds a run already", "--resume", "--out")
    assert contents(run) == before


def test_resume_without_a_run_is_refused(bonn: Command, good: Path, tmp_path: Path) -> None:
    result = bonn("compress", good / "recipe.yaml", "--out", tmp_path / "new", "--resume")
    refused(result, "no state to resume from", "without --resume")
    assert not (tmp_path / "new").exists()


def test_resume_with_another_recipe_is_refused(bonn: Command, good: Path, run: Path) -> None:
    before = contents(run)
    result = bonn("compress", good / "recipe.yaml", "--out", run, "--resume", "--set", "training.epochs=2")
    refused(result, "training/state.pt", "another recipe", "start a new run")
    assert contents(run) == before


def in_state(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = run / "training" / "state.pt"
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)


def flip_a_weight(file: Path) -> None:
    content = bytearray(file.read_bytes())
    weight = torch.load(file, weights_only=True)["model"]["layer3.0.conv2.weight"].numpy().tobytes()
    content[content.index(weight) + 40] ^= 0x10
    file.write_bytes(content)


STATES: dict[str, tuple[Damage, str]] = {
    "empty": (lambda r: (r / "training/state.pt").write_bytes(b""), "not a training state, or damaged"),
    "truncated": (lambda r: truncate(r / "training/state.pt"), "not a training state, or damaged"),
    "a flipped bit in a weight": (lambda r: flip_a_weight(r / "training/state.pt"), "damaged"),
    "a pickle": (
        lambda r: (r / "training/state.pt").write_bytes(pickle.dumps({"a": Path("x")})),
        "not a training state, or damaged",
    ),
    "an object": (lambda r: torch.save({"session": Path("x")}, r / "training/state.pt"), "not a training state"),
    "a list": (lambda r: torch.save([1], r / "training/state.pt"), "not a training state"),
    "another version": (lambda r: in_state(r, lambda s: s["session"].update(version=9)), "version 9"),
    "other steps": (
        lambda r: in_state(r, lambda s: s["session"].update(steps_per_epoch=9)),
        "the data set has changed",
    ),
    "no optimizer": (lambda r: in_state(r, lambda s: s.pop("optimizer")), "not a training state of this package"),
    "weights of another shape": (
        lambda r: in_state(r, lambda s: s["model"].update({"fc.bias": torch.ones(3)})),
        "does not fit",
    ),
    "a weight missing": (lambda r: in_state(r, lambda s: s["model"].pop("fc.bias")), "does not fit"),
    "session of another form": (lambda r: in_state(r, lambda s: s["session"].pop("epoch")), "does not fit"),
    "modifiers missing": (lambda r: in_state(r, lambda s: s["session"].update(modifiers=[])), "does not fit"),
    "optimizer of another form": (lambda r: in_state(r, lambda s: s.update(optimizer={"a": 1})), "does not fit"),
}


@pytest.mark.parametrize("kind", STATES)
def test_resume_refuses_a_wrong_state_and_keeps_the_checkpoint(kind: str, bonn: Command, good: Path, run: Path) -> None:
    damage, says = STATES[kind]
    damage(run)
    before = contents(run)
    result = bonn("compress", good / "recipe.yaml", "--out", run, "--resume")
    refused(result, "run/training/state.pt: ", says)
    assert contents(run) == before


def test_an_unknown_device_is_refused(bonn: Command, good: Path) -> None:
    for device in ("tpu", "cuda:99", "meta", "cpu:x", ""):
        refused(bonn("compress", good / "recipe.yaml", "--device", device), f"device '{device}' can't be used")


def test_an_output_folder_below_a_file_is_refused(bonn: Command, good: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    result = bonn("compress", good / "recipe.yaml", "--out", tmp_path / "file")
    refused(result, "can't write to", "Not a directory")
    assert (tmp_path / "file").read_text() == "x"


def other_network(place: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(2)}, place / "start")


def other_width(place: Path) -> None:
    tensors = safetensors.torch.load_file(place / "whole")
    tensors["bn.weight"] = torch.ones(9)
    safetensors.torch.save_file(tensors, place / "start")


STARTS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "missing": (lambda p: None, ("start: can't be read", "No such file")),
    "not safetensors": (lambda p: (p / "start").write_bytes(b"nonsense" * 9), ("start: not a safetensors file",)),
    "torch.save": (lambda p: torch.save({}, p / "start"), ("start", "a pickle, not safetensors", "refused")),
    "another network": (other_network, ("start has no 'conv1.weight'", "bonn_wrn22_16", "of another network?")),
    "another width": (other_width, ("start: 'bn.weight' has shape (9,), bonn_wrn22_16 needs (8,)",)),
    "empty folder": (lambda p: (p / "start").mkdir(), ("start/config.json: missing",)),
    "state without weights": (
        lambda p: ((p / "start/training").mkdir(parents=True), torch.save({"model": 3}, p / "start/training/state.pt")),
        ("state.pt: not a training state",),
    ),
}


@pytest.mark.parametrize("kind", STARTS)
def test_start_weights_that_do_not_fit_are_refused_with_the_recipes_line(
    kind: str, bonn: Command, tmp_path: Path
) -> None:
    import timm

    make, says = STARTS[kind]
    model = timm.create_model("bonn_wrn22_16", widths=[8, 8, 8], depth=10)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "whole")
    make(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("num_classes: 10", "num_classes: 10, init_from: start"))
    refused(bonn("compress", "recipe.yaml", "--out", "run"), "recipe.yaml:3:58: ", *says)
    assert not (tmp_path / "run").exists()


def test_a_header_that_begins_like_a_pickle_is_none(run: Path) -> None:
    """A safetensors file begins with the length of its header: 640 is 0x80 0x02, as a pickle begins."""
    from bonn_plugin import load_packed

    for length in (0x0280, 0x0480, 0x4B50):
        tensors = safetensors.torch.load_file(run / "model.safetensors")
        content = safetensors.torch.save(tensors)
        (old,) = struct.unpack("<Q", content[:8])
        if length < old:
            continue
        header = content[8 : 8 + old].rstrip(b" ").ljust(length, b" ")
        with_weights(run, struct.pack("<Q", length) + header + content[8 + old :])
        load_packed(run)
    assert re.match(rb"PK", (run / "model.safetensors").read_bytes())


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), ()),
        (("chek",), ("bonn: ", "'chek'", "bonn --help")),
        (("compress",), ("bonn compress: ", "RECIPE", "bonn compress --help")),
        (("check", "--modl", "x"), ("bonn check: ", "--modl", "--model")),
        (("check", "--model", "resnet18", "--num-classes", "0"), ("bonn check: ", "--num-classes", "2")),
        (("compress", "recipe.yaml", "--checkpoint-every", "x"), ("--checkpoint-every", "integer")),
        (("report", "a", "b"), ("bonn report: ", "b")),
    ],
)
def test_a_mistake_of_the_command_line_is_one_line(args: tuple[str, ...], says: tuple[str, ...], bonn: Command) -> None:
    result = bonn(*args)
    if not args:
        assert result.status == 2
        assert result.err == ""
        assert "compress" in result.out
        return
    refused(result, *says)


def test_ctrl_c_outside_of_training_is_one_line(bonn: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bonn_plugin.shipped.find_recipe", interrupted)
    result = bonn("check", "digits_wrn22_16")
    assert (result.status, result.err) == (130, "interrupted\n")
