"""Checkpoints are small, rebuild the model from the files alone, and compute what was trained."""

import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch

from bonn_plugin import ModelConfig, Session, ledger, load_packed, parse_recipe, save_packed, verify_packed
from bonn_plugin.checkpoint import CONFIG, WEIGHTS, load_weights
from bonn_plugin.errors import CheckpointError
from bonn_plugin.nn import BinaryConv2d, Role
from bonn_plugin.recipe import recipe_model
from bonn_plugin.report import Rule, float32_file_bytes
from tests.conftest import TINY, randomize_norms


def packed_network(name, classes, size=32, targets=None, **args):
    """Return (recipe, trained-like model, converted model)."""
    text = TINY.replace(
        "{name: bonn_wrn22_16, num_classes: 10, args: {depth: 10, widths: [8, 8, 16]}}",
        f"{{name: {name}, num_classes: {classes}, args: {args}}}",
    ).replace("data: {name: digits, size: 8}", f"data: {{name: imagefolder, root: none, crop: {size}}}")
    if targets:
        text = text.replace("{type: binarize}", f"{{type: binarize, targets: ['{targets}']}}")
    recipe = parse_recipe(text)
    torch.manual_seed(0)
    session = Session(recipe, 1)
    model = session.prepare(randomize_norms(recipe_model(recipe))).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BinaryConv2d) and module.threshold is not None:
                module.threshold.normal_(0.3, 0.1)
    return recipe, model, session.convert()


@pytest.mark.parametrize(
    ("name", "classes", "parameters", "lowest", "highest"),
    [
        ("bonn_resnet18", 1000, 11_692_520, 11.1, 11.2),
        ("resnet18", 1000, 11_689_512, 11.155, 11.165),
        ("bonn_wrn22_16", 10, 272_282, 20.35, 20.45),
        ("bonn_wrn22_64", 10, 4_326_986, 23.45, 23.55),
    ],
)
def test_compression_by_parameters_is_the_papers(name, classes, parameters, lowest, highest):
    _, _, packed = packed_network(name, classes)
    book = ledger(packed)
    counted = book.select([Role.BINARY_WEIGHT, Role.REAL_WEIGHT, Role.NORM])
    assert sum(entry.original_bits for entry in counted) == 32 * parameters
    binary = sum(p.numel() for n, p in timm.create_model(name).named_parameters() if p.dim() == 4 and p.shape[-1] == 3)
    if "wrn" in name:
        binary -= 27 * (64 if "64" in name else 16)  # the first convolution is 3x3 too
    by_hand = 32 * parameters / (binary + 32 * (parameters - binary))
    assert book.rate(Rule.PARAMETERS) == pytest.approx(by_hand, rel=1e-12)
    assert lowest <= book.rate(Rule.PARAMETERS) <= highest
    assert book.rate(Rule.WITH_STATISTICS) < book.rate(Rule.WITH_SCALES) < book.rate(Rule.PARAMETERS)


@pytest.mark.parametrize(
    ("name", "classes", "times"),
    [("bonn_resnet18", 1000, 11.0), ("bonn_wrn22_16", 10, 16.0), ("bonn_wrn22_64", 10, 22.0)],
)
def test_the_file_really_is_small(name, classes, times, tmp_path):
    recipe, _, packed = packed_network(name, classes)
    folder = save_packed(packed, tmp_path, recipe)
    original = timm.create_model(name, num_classes=classes)
    safetensors.torch.save_file(original.state_dict(), tmp_path / "float32.safetensors")
    float32 = (tmp_path / "float32.safetensors").stat().st_size
    assert float32 == float32_file_bytes(original)
    assert float32 / (folder / WEIGHTS).stat().st_size >= times


def test_packed_weights_take_one_bit_each(tmp_path):
    recipe, model, packed = packed_network("bonn_wrn22_16", 10)
    folder = save_packed(packed, tmp_path, recipe)
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    for name in BinaryConv2d.names_in(model):
        assert f"{name}.weight" not in tensors
        stored = tensors[f"{name}.weight_packed"]
        assert stored.dtype == torch.uint8
        assert 8 * stored.numel() == model.get_submodule(name).weight.numel()


@pytest.mark.parametrize(
    ("name", "size", "targets"),
    [
        ("bonn_resnet18", 32, None),
        ("bonn_wrn22_16", 16, None),
        ("resnet18", 32, None),
        ("resnet50", 32, None),
        ("mobilenetv3_small_050", 32, r"re:blocks\..*conv_pwl?"),
        ("convnext_atto", 32, r"re:stages\.\d\.downsample\.1"),
    ],
)
def test_a_reloaded_network_gives_the_trained_ones_logits_bit_for_bit(name, size, targets, tmp_path):
    recipe, model, packed = packed_network(name, 10, size, targets)
    folder = save_packed(packed, tmp_path, recipe)
    x = torch.randn(16, 3, size, size)
    with torch.no_grad():
        assert torch.equal(load_packed(folder)(x), model(x))
    assert verify_packed(folder).identical


def test_a_new_process_rebuilds_the_model_from_the_folder_alone(tmp_path):
    recipe, model, packed = packed_network("bonn_wrn22_16", 10, 16)
    folder = save_packed(packed, tmp_path / "out", recipe)
    x = torch.randn(512, 3, 16, 16)
    with torch.no_grad():
        safetensors.torch.save_file({"x": x, "y": model(x)}, tmp_path / "io.safetensors")
    script = (
        "import sys, torch, safetensors.torch\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "from bonn_plugin import load_packed\n"
        "io = safetensors.torch.load_file(sys.argv[2])\n"
        "with torch.no_grad(): y = load_packed(sys.argv[1])(io['x'])\n"
        "sys.exit(0 if torch.equal(y, io['y']) else 7)\n"
    )
    command = [sys.executable, "-c", script, str(folder), str(tmp_path / "io.safetensors")]
    assert subprocess.run(command, check=False, cwd=tmp_path).returncode == 0


def test_a_checkpoint_without_a_recipe_still_rebuilds(tmp_path):
    _, model, packed = packed_network("bonn_wrn22_16", 10, 32)
    folder = save_packed(packed, tmp_path, ModelConfig(name="bonn_wrn22_16", num_classes=10))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_packed(folder)(x), model(x))
    assert verify_packed(folder).identical


def test_a_model_in_training_form_is_not_saved(tmp_path):
    recipe, model, _ = packed_network("bonn_wrn22_16", 10, 32)
    with pytest.raises(CheckpointError, match=r"layer1\.0\.conv1 is still in training form"):
        save_packed(model, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_weights_to_start_from_come_back_as_the_binary_values(tmp_path):
    recipe, model, packed = packed_network("bonn_wrn22_16", 10, 32)
    weights = load_weights(save_packed(packed, tmp_path, recipe))
    layer = model.layer1[0].conv1
    scale = float(layer.modulation.detach().mean())
    wanted = torch.where(layer.weight.detach() >= 0, scale, -scale)
    assert torch.equal(weights["layer1.0.conv1.weight"], wanted)
    assert torch.equal(weights["fc.weight"], model.fc.weight)


def test_another_folder_of_the_same_model_has_the_same_bytes(tmp_path):
    recipe, _, packed = packed_network("bonn_wrn22_16", 10, 32)
    first, second = (save_packed(packed, tmp_path / str(i), recipe) for i in range(2))
    for name in (WEIGHTS, CONFIG):
        assert (first / name).read_bytes() == (second / name).read_bytes()
