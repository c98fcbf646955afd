"""``channel_prune``: fewer channels, rebuilt from the checkpoint, counted against the whole network."""

import json

import pytest
import torch
from torch import nn

pytest.importorskip("torch_pruning")

from bonn_plugin import Session, ledger, load_packed, parse_recipe, save_packed, verify_packed
from bonn_plugin.checkpoint import load_state
from bonn_plugin.errors import CheckpointError, ModelError
from bonn_plugin.nn.resize import resize, size_of
from bonn_plugin.recipe import RecipeError, recipe_model
from bonn_plugin.report import Rule
from bonn_plugin.report.ledger import RULES
from bonn_plugin.train import STATE, Runner
from tests.conftest import randomize_norms

BASE = r"""version: 1
name: pruned
model: {name: NETWORK, num_classes: 10}
data: {name: digits, size: SIZE}
training: {epochs: 2, batch_size: 128, optimizer: {name: adam, lr: 1e-2}}
modifiers:
  - {type: channel_prune, OPTIONS}
  - {type: binarize}
"""
TARGETS = {"mobilenetv3_small_100": r"{type: binarize, targets: ['re:blocks\..*conv_pwl?']}"}
SIZES = {"resnet18": 64, "bonn_resnet18": 64, "bonn_wrn22_16": 16, "mobilenetv3_small_100": 64}


def recipe(network="bonn_wrn22_16", options="ratio: 0.5", size=None):
    size = size or SIZES.get(network, 8)
    text = BASE.replace("NETWORK", network).replace("OPTIONS", options).replace("SIZE", str(size))
    return parse_recipe(text.replace("{type: binarize}", TARGETS.get(network, "{type: binarize}")), "pruned.yaml")


def prepared(settings, seed=0):
    torch.manual_seed(seed)
    session = Session(settings, 2)
    session.prepare(recipe_model(settings))
    return session


@pytest.mark.parametrize("network", SIZES)
def test_the_pruned_network_is_rebuilt_from_its_files_and_counted_against_the_whole_one(network, tmp_path):
    settings = recipe(network, "ratio: 0.3")
    session = prepared(settings)
    x = torch.randn(3, 3, SIZES[network], SIZES[network])
    session.model.train()(x).square().sum().backward()
    randomize_norms(session.model)
    packed = session.convert()
    save_packed(packed, tmp_path / "out", settings)
    again = load_packed(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(x), packed(x))
    assert verify_packed(tmp_path / "out").identical
    whole = ledger(recipe_model(settings))
    for rule in Rule:
        then, now, read = (
            sum(e.original_bits for e in book.select(RULES[rule])) for book in map(ledger_of, (whole, packed, again))
        )
        assert then == now == read
    assert ledger(again).entries == ledger(packed).entries
    assert sum(p.numel() for p in session.model.parameters()) < sum(
        p.numel() for p in recipe_model(settings).parameters()
    )


def ledger_of(model):
    return ledger(model) if isinstance(model, nn.Module) else model


@pytest.mark.parametrize("network", ["resnet18", "bonn_resnet18"])
def test_an_int8_rest_of_a_pruned_network_counts_against_the_whole_one(network, tmp_path):
    pytest.importorskip("neural_compressor")
    text = BASE.replace("NETWORK", network).replace("OPTIONS", "ratio: 0.3").replace("SIZE", "64")
    settings = parse_recipe(f"{text}  - {{type: inc_int8}}\n", "pruned.yaml")
    session = prepared(settings)
    x = torch.randn(2, 3, 64, 64)
    packed = session.convert(lambda: [x])
    save_packed(packed, tmp_path / "out", settings)
    again = load_packed(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(x), packed(x))
    parameters = sum(p.numel() for p in recipe_model(settings).parameters())
    for model in (packed, again):
        assert any(type(m).__name__ == "IntegerConv2d" for m in model.modules())
        assert sum(e.original_bits for e in ledger(model).select(RULES[Rule.PARAMETERS])) == 32 * parameters


def test_the_channels_with_the_smallest_weights_go():
    torch.manual_seed(0)
    settings = recipe(options="ratio: 0.5, importance: magnitude")
    model = recipe_model(settings)
    conv, after = model.layer1[0].conv1, model.layer1[0].conv2
    with torch.no_grad():
        conv.weight[3:11] *= 0.01
    kept = [*range(3), *range(11, 16)]
    # what of conv2's input is kept shows in the weights of conv1; conv2's outputs belong to the stem's group
    want = conv.weight.detach()[kept].clone()
    session = Session(settings, 2)
    session.prepare(model)
    got = session.model.layer1[0].conv1.weight.detach()
    assert got.shape[0] == 8
    inputs = [
        torch.equal(got[i], want[i][[j for j in range(16) if j in _kept_inputs(want[i], got[i])]]) for i in range(8)
    ]
    assert all(inputs)
    assert after is not None


def _kept_inputs(whole, left):
    return [j for j in range(whole.shape[0]) if any(torch.equal(whole[j], left[k]) for k in range(left.shape[0]))]


def test_without_the_pruned_channels_the_other_outputs_are_what_they_were():
    """A channel whose weights are zero is taken away and nothing changes."""
    torch.manual_seed(0)
    settings = parse_recipe(
        BASE.replace("NETWORK", "bonn_wrn22_16, args: {depth: 10}")
        .replace("SIZE", "8")
        .replace("OPTIONS", "ratio: 0.25, ignore: [conv1, 're:layer\\d\\.\\d\\.(conv2|shortcut)']")
        .replace("  - {type: binarize}\n", "")
    )
    model = randomize_norms(recipe_model(settings)).eval()
    with torch.no_grad():
        for stage in (model.layer1, model.layer2, model.layer3):
            block = stage[0]
            n = block.conv1.weight.shape[0] // 4
            block.conv1.weight[:n] = 0
            block.conv2.weight[:, :n] = 0
            block.bn2.weight[:n] = 0
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        before = model(x)
    session = Session(settings, 2)
    session.prepare(model)
    assert session.model.layer1[0].conv1.weight.shape[0] == 12
    with torch.no_grad():
        torch.testing.assert_close(session.model.eval()(x), before)


def test_pruning_is_the_same_each_time_and_moves_no_mode():
    first, second = (prepared(recipe()).model for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert first.training


def test_round_to_leaves_a_multiple():
    model = prepared(recipe("bonn_resnet18", "ratio: 0.4, round_to: 16")).model
    widths = {m.geometry.out_channels for m in model.modules() if hasattr(m, "geometry")}
    assert widths == {32, 64, 144, 304}


class Quiet:
    def line(self, text):
        pass

    def steps(self, batches, epoch, epochs, total):
        return batches


def test_a_run_starts_from_trained_weights_prunes_resumes_and_reports_the_channels(tmp_path):
    text = BASE.replace("NETWORK", "bonn_wrn22_16, args: {depth: 10, widths: [8, 8, 16]}, init_from: START").replace(
        "SIZE", "8"
    )
    text = text.replace("OPTIONS", "ratio: 0.5")
    first = parse_recipe(text.replace(", init_from: START", "").partition("modifiers:")[0])
    runner = Runner(first, tmp_path / "first", torch.device("cpu"), Quiet())
    runner.train(resume=False)
    settings = parse_recipe(text.replace("START", f"'{tmp_path}/first'"), "pruned.yaml")
    whole = Runner(settings, tmp_path / "whole", torch.device("cpu"), Quiet())
    trained = load_state(tmp_path / "first" / STATE)["model"]["conv1.weight"]
    rows = whole.model.conv1.weight.detach()
    assert len(rows) == 4
    assert all(any(torch.equal(row, given) for given in trained) for row in rows), "the start's weights, not others"
    whole.train(resume=False)

    part = Runner(settings, tmp_path / "part", torch.device("cpu"), Quiet())
    save = part._save

    def stop(*args, **kwargs):
        save(*args, **kwargs)
        raise KeyboardInterrupt

    part._save = stop
    with pytest.raises(KeyboardInterrupt):
        part.train(resume=False)
    resumed = Runner(settings, tmp_path / "part", torch.device("cpu"), Quiet())
    resumed.train(resume=True)
    states = [load_state(tmp_path / name / STATE)["model"] for name in ("whole", "part")]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    report = whole.finish().report
    assert report.accuracy.identical_logits
    rows = {row.name: (row.before, row.after) for row in report.pruned}
    assert rows["conv1"] == (8, 4)
    assert rows["layer3.0.conv1"] == (16, 8)
    assert "fc" not in rows
    markdown = (tmp_path / "whole/report.md").read_text()
    assert "| layer3.0.conv1 | 16 | 8 | 50.0 |" in markdown


@pytest.mark.parametrize(
    ("network", "options", "said"),
    [
        ("bonn_wrn22_16", "ratio: 0.97", r":7:\d+: ratio 0.97 leaves none of the 32 channels of layer2"),
        ("bonn_wrn22_16", "ratio: 0.5, round_to: 16", "rounded to a multiple of 16, leaves none of the 16 channels"),
        ("bonn_wrn22_16", "ratio: 0.01", None),
        ("bonn_wrn22_16", "ratio: 0.5, ignore: [conv2]", r"'conv2' matches none: no convolution or linear layer"),
        ("bonn_wrn22_16", "ratio: 0.5, ignore: [bn]", "bn is a BatchNorm2d: no convolution or linear layer"),
        ("bonn_wrn22_16", "ratio: 0.5, ignore: ['re:.*']", "takes no channel from any layer"),
        ("convnext_atto", "ratio: 0.5", "torch-pruning can't prune|not stored yet"),
    ],
)
def test_what_can_not_be_pruned_is_one_line(network, options, said):
    settings = recipe(network, options, size=32 if network == "convnext_atto" else None)
    if said is None:
        model = prepared(settings).model
        assert model.conv1.weight.shape[0] == 15
        return
    with pytest.raises(ModelError, match=said) as caught:
        prepared(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options", ["ratio: 1", "ratio: 0", "ratio: 0.5, importance: taylor", "ratio: 0.5, ignore: ['re:(']"]
)
def test_settings_out_of_range_are_told(options):
    with pytest.raises(RecipeError, match=r"pruned\.yaml:7:"):
        recipe(options=options)


def test_without_torch_pruning_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_pruning", None)
    with pytest.raises(ModelError, match=r"pip install 'bonn_plugin\[prune\]'"):
        prepared(recipe())


def test_a_size_that_makes_no_sense_is_a_damaged_checkpoint(tmp_path):
    settings = recipe(size=8)
    packed = prepared(settings).convert()
    save_packed(packed, tmp_path / "out", settings)
    place = tmp_path / "out/config.json"
    from bonn_plugin.checkpoint import _digest

    for change in (
        {"attributes": {"in_channels": 3, "out_channels": 99, "groups": 1}},
        {"shapes": {"weight": [0, 3, 3, 3]}},
        {"shapes": {}},
    ):
        config = json.loads(place.read_text())
        config["pruned"]["conv1"]["size"] = {**config["pruned"]["conv1"]["size"], **change}
        del config["self"]
        config["self"] = _digest(config)
        broken = tmp_path / "broken"
        broken.mkdir(exist_ok=True)
        for name in ("model.safetensors", "recipe.yaml"):
            (broken / name).write_bytes((tmp_path / "out" / name).read_bytes())
        (broken / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="module 'conv1' can't be resized"):
            load_packed(broken)


@pytest.mark.parametrize(
    "module", [nn.Conv2d(8, 16, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 4), nn.BatchNorm2d(8), nn.PReLU(8)]
)
def test_a_module_takes_the_size_of_a_smaller_one(module):
    small = {
        nn.Conv2d: lambda: nn.Conv2d(4, 4, 3, groups=4) if module.groups > 1 else nn.Conv2d(4, 6, 3),
        nn.Linear: lambda: nn.Linear(3, 2),
        nn.BatchNorm2d: lambda: nn.BatchNorm2d(5),
        nn.PReLU: lambda: nn.PReLU(3),
    }[type(module)]()
    resize(module, size_of(small))
    module.load_state_dict(small.state_dict())
    assert str(module) == str(small)
    assert size_of(nn.LayerNorm(3)) is None
    with pytest.raises(ValueError, match="no size of a LayerNorm"):
        resize(nn.LayerNorm(3), size_of(small))
