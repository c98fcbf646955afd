"""integrations/torchvision_detection: a detection loop of one's own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bonn_plugin import load_packed, verify_packed
from bonn_plugin.nn import PackedConv2d

pytest.importorskip("pycocotools")
FOLDER = Path(__file__).parent.parent / "integrations" / "torchvision_detection"
SMALL = ("data.train=24", "data.test=8", "training.epochs=1", "model.args.widths=[8, 8, 8, 8]")


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("integration_torchvision_detection", FOLDER / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, recipe: Path, out: Path, *settings: str) -> None:
    args = [part for setting in settings for part in ("--set", setting)]
    monkeypatch.setattr(
        sys, "argv", ["train.py", str(recipe), "--out", str(out), "--device", "cpu", "--real-epochs", "1", *args]
    )
    script.main()


def test_the_loop_trains_packs_and_measures_a_detector(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(script, monkeypatch, FOLDER / "recipe.yaml", tmp_path / "out", *SMALL)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("float32, epoch 1/1: classification")
    assert "kernel" not in lines[0]
    assert lines[1].startswith("1 bit, epoch 1/1: classification")
    assert "kernel" in lines[1]
    assert lines[2].startswith(f"{tmp_path / 'out'}: packed, test_map ")
    assert verify_packed(tmp_path / "out").identical
    packed = load_packed(tmp_path / "out")
    assert sum(isinstance(module, PackedConv2d) for module in packed.modules()) == 12
    assert {"boxes", "scores", "labels"} == set(packed([torch.rand(3, 64, 64)])[0])


def test_a_mistake_is_one_line(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Path(__file__).parent.parent / "recipes" / "digits_wrn22_16.yaml"
    with pytest.raises(SystemExit) as stop:
        run(script, monkeypatch, recipe, tmp_path / "out")
    assert stop.value.code == 2
    assert "its task is classification, this script trains detectors\n" in capsys.readouterr().err
