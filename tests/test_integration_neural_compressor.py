"""integrations/neural_compressor runs as it stands; the framework's algorithms one after the other."""

import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from neural_compressor.torch.export import export
from neural_compressor.torch.quantization import StaticQuantConfig, prepare

from bonn_plugin import verify_packed
from bonn_plugin.errors import BonnError
from bonn_plugin.inc import BonnConfig

pytestmark = pytest.mark.filterwarnings("ignore")
SCRIPT = Path(__file__).parent.parent / "integrations" / "neural_compressor" / "bonn_then_int8.py"


def test_the_script_trains_packs_and_quantises_the_rest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("bonn_then_int8", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "NETWORK", {"depths": [1, 1, 0, 0], "widths": [8, 16, 16, 16]})
    found = script.main(["--epochs", "2", "--out", str(tmp_path / "out")])
    assert found["packed"] == found["trained"] > 30
    assert abs(found["int8"] - found["packed"]) < 10
    assert verify_packed(tmp_path / "out").identical


def test_after_the_frameworks_int8_there_is_nothing_left_to_binarise():
    torch.manual_seed(0)
    model = timm.create_model("bonn_resnet18", num_classes=10, depths=[1, 0, 0, 0], widths=[8, 8, 8, 8]).eval()
    example = torch.randn(2, 3, 32, 32)
    prepared = prepare(export(model, (example,)), StaticQuantConfig())
    with pytest.raises(BonnError, match="no convolution is taken by default"):
        prepare(prepared, BonnConfig(), example_inputs=example)
