"""ReActNet's parts as options of ``binarize``: real weights, RSign, RPReLU; digits with few images."""

import pytest
import torch
from torch import nn

from bonn_plugin import Session, ledger, load_packed, parse_recipe, save_packed, verify_packed
from bonn_plugin.check import forecast
from bonn_plugin.data import load_splits
from bonn_plugin.errors import CheckpointError, DataError, ModelError
from bonn_plugin.modifiers.activations import following_activations
from bonn_plugin.nn import BinaryConv2d, RPReLU, SignConv2d, StoredSignConv2d
from bonn_plugin.recipe import DigitsConfig, RecipeError, recipe_model
from bonn_plugin.report import Rule
from bonn_plugin.train import Quiet, Runner
from bonn_plugin.train.start import Start
from tests.conftest import TINY, randomize_norms

BASE = """version: 1
name: net
model: {name: NETWORK, num_classes: 10}
data: {name: digits, size: 32}
training: {epochs: 2, batch_size: 32, optimizer: {name: adam, lr: 1e-2}}
modifiers:
  - {type: binarize, OPTIONS}
"""


def recipe(options, network="bonn_resnet18, args: {widths: [8, 8, 16, 16]}"):
    return parse_recipe(BASE.replace("NETWORK", network).replace("OPTIONS", options), "net.yaml")


def session_of(settings, seed=0):
    torch.manual_seed(seed)
    session = Session(settings, 2)
    session.prepare(recipe_model(settings))
    return session


def test_a_layer_with_real_weights_is_a_convolution_of_signs_written_as_loops():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    layer = SignConv2d(conv)
    layer.add_threshold(from_input=False)
    nn.init.normal_(layer.threshold)
    layer.eval()
    x = torch.randn(2, 3, 5, 5)
    output = layer(x)
    output.sum().backward()
    assert layer.threshold.grad is not None
    assert layer.weight.grad is not None
    layer.requires_grad_(False)
    got = output.detach()
    for b, o, i, j in [(0, 0, 0, 0), (1, 3, 1, 2), (0, 2, 2, 2)]:
        want = float(conv.bias[o])
        for c in range(3):
            for k in range(3):
                for m in range(3):
                    row, column = 2 * i + k - 1, 2 * j + m - 1
                    if 0 <= row < 5 and 0 <= column < 5:
                        sign = 1.0 if x[b, c, row, column] >= layer.threshold[c] else -1.0
                        want += sign * float(conv.weight[o, c, k, m])
        assert float(got[b, o, i, j]) == pytest.approx(want, abs=1e-5)
    assert torch.equal(layer.pack().eval()(x), got)


def test_the_gradient_of_real_weights_is_the_convolutions_own():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1)
    x = torch.randn(2, 3, 5, 5)
    layer = SignConv2d(conv)
    (got,) = torch.autograd.grad(layer(x).square().sum(), conv.weight)
    signs = torch.where(x >= 0, 1.0, -1.0)
    (want,) = torch.autograd.grad(nn.functional.conv2d(signs, conv.weight, conv.bias, 1, 1).square().sum(), conv.weight)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("network", ["bonn_resnet18, args: {widths: [8, 8, 16, 16]}", "resnet10t"])
@pytest.mark.parametrize("weights", ["real", "binary"])
def test_all_options_together_train_pack_and_reload_to_the_same_logits(network, weights, tmp_path):
    options = f"weights: {weights}, activation: rprelu, threshold: always, threshold_init: zero, ste: polynomial"
    settings = recipe(options, network)
    session = session_of(settings)
    model = session.model
    kind = SignConv2d if weights == "real" else BinaryConv2d
    layers = [m for m in model.modules() if isinstance(m, kind)]
    assert layers
    assert all(not layer.threshold.any() and not layer.awaits_threshold for layer in layers)
    x = torch.randn(4, 3, 32, 32)
    model.train()(x).square().sum().backward()
    assert not any(layer.threshold.any() for layer in layers), "RSign starts at zero and follows no mean"
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, RPReLU):
                assert m.shift_in.grad is not None
                for p in m.parameters():
                    p.add_(torch.randn_like(p) * 0.1)
    randomize_norms(model)
    packed = session.convert()
    model.eval()
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))
        save_packed(packed, tmp_path / "out", settings)
        assert torch.equal(load_packed(tmp_path / "out")(x), model(x))
    assert verify_packed(tmp_path / "out").identical
    original = ledger(recipe_model(settings))
    for rule in Rule:
        counted = lambda book, r=rule: sum(e.original_bits for e in book.entries)  # noqa: E731
        assert counted(ledger(packed)) == counted(original)
    if weights == "real":
        assert ledger(packed).rate() == pytest.approx(1, abs=1e-3)


def test_a_network_in_training_form_is_not_saved(tmp_path):
    settings = recipe("weights: real, threshold: never")
    with pytest.raises(CheckpointError, match="still in training form"):
        save_packed(session_of(settings).model, tmp_path / "out", settings)


def test_rprelu_is_the_equation_written_as_loops():
    torch.manual_seed(0)
    act = RPReLU(3)
    assert torch.equal(
        act(torch.tensor([[[-4.0]], [[0.0]], [[2.0]]])[None])[0].flatten(), torch.tensor([-1.0, 0.0, 2.0])
    )
    with torch.no_grad():
        for p in act.parameters():
            p.normal_()
    x = torch.randn(2, 3, 4, 4)
    act.requires_grad_(False)
    got = act(x)
    for b in range(2):
        for c in range(3):
            for i in range(4):
                for j in range(4):
                    gamma, beta, zeta = (float(p[c]) for p in (act.shift_in, act.weight, act.shift_out))
                    value = float(x[b, c, i, j])
                    want = value - gamma + zeta if value > gamma else beta * (value - gamma) + zeta
                    assert float(got[b, c, i, j]) == pytest.approx(want, abs=1e-5)


def test_rprelu_keeps_the_slopes_of_a_prelu_and_counts_them_as_original():
    shared, own = nn.PReLU(), nn.PReLU(4)
    nn.init.uniform_(own.weight)
    assert torch.equal(RPReLU.like(own, 4).weight, own.weight)
    assert RPReLU.like(shared, 4).stored_tensors()["weight"].original_elements == 1
    assert RPReLU.like(nn.ReLU(), 4).stored_tensors()["weight"].original_elements == 0
    assert torch.equal(RPReLU.like(nn.ReLU(), 4).weight, torch.full((4,), 0.25))
    with pytest.raises(ValueError, match="not the numbers of an RPReLU"):
        RPReLU.from_spec({"channels": 4, "original_slopes": 5})


def test_each_binarised_convolution_of_a_resnet_gets_its_own_activation():
    model = recipe_model(recipe("threshold: never", "resnet18"))
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n[:5] == "layer" and ".conv" in n]
    found = following_activations(model, names, torch.randn(2, 3, 64, 64))
    assert {n: f.name for n, f in found.items()} == {n: n.replace("conv", "act") for n in names}
    assert found["layer3.0.conv2"].channels == 256


def test_check_names_the_activations_that_are_replaced():
    settings = recipe("activation: rprelu, weights: real")
    seen = forecast(settings, recipe_model(settings))
    assert all("act becomes RPReLU" in layer.remark and "weights stay real" in layer.remark for layer in seen.layers)


def test_a_network_without_an_activation_behind_a_binarised_convolution_is_refused():
    with pytest.raises(ModelError, match=r"net.yaml:7:.*no activation module follows layer1.0.conv1 before the next"):
        session_of(recipe("activation: rprelu", "bonn_wrn22_16"))


def test_one_activation_behind_convolutions_of_different_widths_is_refused():
    act = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), act, nn.Conv2d(4, 8, 3), act)
    with pytest.raises(ModelError, match="1 follows convolutions of 4 and of 8 channels"):
        following_activations(model, ["0", "2"], torch.randn(1, 3, 8, 8))


def test_a_threshold_that_is_not_there_takes_no_first_value():
    with pytest.raises(RecipeError, match="there is no threshold to give a first value"):
        recipe("threshold: never, threshold_init: zero")


def test_a_second_step_starts_with_the_first_steps_weights_and_thresholds(tmp_path):
    first = session_of(recipe("weights: real, activation: rprelu, threshold: always"))
    model = first.model.train()
    model(torch.rand(4, 3, 32, 32))
    second = recipe("activation: rprelu, threshold: always")
    torch.manual_seed(1)
    network = recipe_model(second)
    start = Start(second, "first", model.state_dict(), print)
    with pytest.raises(CheckpointError, match="has no"):
        Start(second, "first", {}, print).fill(network)
    start.fill(network)
    session = Session(second, 2)
    session.prepare(network)
    start.fill(session.model, added_only=True)
    for name, layer in session.model.named_modules():
        other = model.get_submodule(name)
        if isinstance(layer, BinaryConv2d):
            assert torch.equal(layer.weight, other.weight)
            assert torch.equal(layer.threshold, other.threshold)
            assert layer.modulation[0, 0, 0].item() == pytest.approx(other.weight.abs().mean().item(), rel=1e-5)
        if isinstance(layer, RPReLU):
            assert torch.equal(layer.shift_in, other.shift_in)


def test_thresholds_that_a_start_gave_are_not_set_from_batches_again():
    layer = BinaryConv2d(nn.Conv2d(3, 4, 3), threshold=True)
    with torch.no_grad():
        layer.threshold.fill_(7)
        layer.threshold_batches.fill_(8)
    layer.train()(torch.rand(2, 3, 5, 5))
    assert torch.equal(layer.threshold, torch.full((3,), 7.0))


def test_a_run_with_real_weights_goes_through_and_its_report_says_so(tmp_path):
    settings = parse_recipe(
        TINY.replace("{type: binarize}", "{type: binarize, weights: real}").partition("  - {type: kernel")[0]
    )
    runner = Runner(settings, tmp_path / "out", torch.device("cpu"), Quiet())
    runner.train(resume=False)
    report = runner.finish().report
    assert report.accuracy.identical_logits
    assert "The activations are binarised, the weights are not" in (tmp_path / "out/report.md").read_text()
    assert any(isinstance(m, StoredSignConv2d) for m in load_packed(tmp_path / "out").modules())


def test_few_images_a_class_are_stratified_seeded_and_leave_the_test_set_alone():
    whole, few, again, other = (
        load_splits(DigitsConfig(size=8, **settings), 10)
        for settings in ({}, {"per_class": 10}, {"per_class": 10}, {"per_class": 10, "subset_seed": 1})
    )
    labels = torch.tensor([few.train[i][1] for i in range(len(few.train))])
    assert torch.bincount(labels).tolist() == [10] * 10
    assert torch.equal(few.train.images, again.train.images)
    assert not torch.equal(few.train.images, other.train.images)
    assert torch.equal(few.test.images, whole.test.images)
    rows = {tuple(image.flatten().tolist()) for image in whole.train.images}
    assert all(tuple(image.flatten().tolist()) in rows for image in few.train.images)
    with pytest.raises(DataError, match="per_class is 1000, the training set has 133 images of class 0"):
        load_splits(DigitsConfig(size=8, per_class=1000), 10)
