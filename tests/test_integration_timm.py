"""integrations/timm: the script trains on a folder of pictures with timm's own parts."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bonn_plugin import load_packed, verify_packed
from bonn_plugin.nn import PackedConv2d

FOLDER = Path(__file__).parent.parent / "integrations" / "timm"
pytestmark = [  # timm's reader opens pictures and leaves their closing to the garbage collector
    pytest.mark.filterwarnings("ignore:unclosed file.*[.]png:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in.*[.]png:pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("integration_timm", FOLDER / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pictures(tmp_path):
    """Two classes, light above and light below."""
    random = np.random.default_rng(0)
    for split, images in (("train", 16), ("val", 8)):
        for label in ("above", "below"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(images):
                picture = random.integers(0, 100, (40, 40, 3))
                picture[:20] += 155
                if label == "below":
                    picture = picture[::-1]
                Image.fromarray(picture.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "images"


def run(script, monkeypatch, out, *settings):
    args = [part for setting in settings for part in ("--set", setting)]
    monkeypatch.setattr(sys, "argv", ["train.py", str(FOLDER / "recipe.yaml"), "--out", str(out), *args])
    script.main()


SMALL = (
    "model.num_classes=2",
    "data.crop=32",
    "data.workers=0",
    "data.flip=false",
    "training.epochs=4",
    "training.batch_size=8",
    "training.schedule.warmup_epochs=1",
    "modifiers.kernel_loss.start=1",
)


def test_the_script_trains_saves_and_measures(script, pictures, tmp_path, monkeypatch, capsys):
    run(script, monkeypatch, tmp_path / "out", f"data.root={pictures}", *SMALL)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:4]] == [f"epoch {i}/4" for i in (1, 2, 3, 4)]
    assert lines[4].startswith(f"{tmp_path / 'out'}: packed, top-1 ")
    assert verify_packed(tmp_path / "out").identical
    packed = load_packed(tmp_path / "out")
    assert sum(isinstance(module, PackedConv2d) for module in packed.modules()) == 16
    assert lines[3].partition("top-1 ")[2] == lines[4].partition("top-1 ")[2]  # packed as trained


def test_the_shipped_recipe_fits_its_network(script):
    from bonn_plugin import Session, load_recipe
    from bonn_plugin.recipe import recipe_model

    recipe = load_recipe(FOLDER / "recipe.yaml")
    Session(recipe, 1).prepare(recipe_model(recipe))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (("data={name: digits}",), "data 'digits' is no folder of images"),
        (("data.root=nowhere",), "nowhere/train: no such folder"),
    ],
)
def test_data_that_does_not_fit_is_told_in_one_line(script, settings, line, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(script, monkeypatch, tmp_path / "out", *settings)
    assert stop.value.code == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert line in told
