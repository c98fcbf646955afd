"""neural-compressor's passes on the real-valued rest: what they find, what we store, what a reload computes."""

import copy
import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

from bonn_plugin import Session, ledger, load_packed, parse_recipe, save_packed, verify_packed
from bonn_plugin.checkpoint import WEIGHTS, load_weights
from bonn_plugin.errors import BonnError, CheckpointError, ModelError
from bonn_plugin.nn import (
    FoldedNorm,
    HalfConv2d,
    HalfLinear,
    IntegerConv2d,
    IntegerLinear,
    PackedConv2d,
    Role,
    WeightOnlyLinear,
    replacement_class,
)
from bonn_plugin.passes import look, round_to_nearest, to_half
from bonn_plugin.recipe import recipe_model
from bonn_plugin.report import Rule, float32_file_bytes
from tests.conftest import TINY, randomize_norms
from tests.small import RECIPE, Command

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
INT8 = "{type: inc_int8}"


def images(n=4, size=8, seed=0, channels=3):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def calibration(size=8, batches=3):
    return lambda: (images(4, size, seed) for seed in range(batches))


def recipe_with(*modifiers, network=None, size=8):
    text = TINY + "".join(f"  - {m}\n" for m in modifiers)
    if network:
        text = text.replace("{name: bonn_wrn22_16, num_classes: 10, args: {depth: 10, widths: [8, 8, 16]}}", network)
        text = text.replace("data: {name: digits, size: 8}", f"data: {{name: imagefolder, root: none, crop: {size}}}")
    return parse_recipe(text, "r.yaml")


def session_with(*modifiers, **kwargs):
    recipe = recipe_with(*modifiers, **kwargs)
    torch.manual_seed(0)
    session = Session(recipe, 1)
    session.prepare(randomize_norms(recipe_model(recipe))).eval()
    return session


def converted(*modifiers, size=8, **kwargs):
    session = session_with(*modifiers, size=size, **kwargs)
    return session, session.convert(calibration(size))


def host_graph(model, name_of_targets, batches, *, dynamic=False):
    """The whole network through the framework's own calls, what is no target excluded by its exact name."""
    from neural_compressor.torch.export import export
    from neural_compressor.torch.quantization import DynamicQuantConfig, StaticQuantConfig, convert, prepare
    from torchao.quantization.pt2e import quantize_pt2e

    kind = DynamicQuantConfig if dynamic else StaticQuantConfig
    settings = {"w_granularity": "per_channel"} if dynamic else {}
    config = kind(**settings)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and name not in name_of_targets:
            config.set_local(name, kind(w_dtype="fp32", act_dtype="fp32"))
    prepared = prepare(export(copy.deepcopy(model), (batches[0],)), config)
    for batch in batches:
        prepared(batch)
    with pytest.MonkeyPatch.context() as patch:  # it looks for layers of QAT, which there are none of, for 20 seconds
        patch.setattr(quantize_pt2e, "_fold_conv_bn_qat", lambda graph: graph)
        return convert(prepared)


ONE_BLOCK = "{name: bonn_resnet18, num_classes: 10, args: {depths: [1, 0, 0, 0], widths: [8, 8, 8, 8]}}"
TWO_BLOCKS = "{name: bonn_resnet18, num_classes: 10, args: {depths: [1, 1, 0, 0], widths: [8, 16, 16, 16]}}"
SMALL_RESNET = "{name: bonn_resnet18, num_classes: 10, args: {depths: [1, 1, 1, 1], widths: [8, 8, 16, 16]}}"


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("network", "targets", "cosine", "difference"),
    [
        (ONE_BLOCK, ("conv1", "fc"), 0.9999999, 1e-5),  # the same numbers; the order of float sums differs
        # Behind a 1x1 convolution the framework quantises the other operand of the addition too, which no target names.
        (TWO_BLOCKS, ("conv1", "layer2.0.downsample.1", "fc"), 0.9999, 0.02),
    ],
)
def test_static_int8_is_what_the_framework_makes_of_the_whole_network(network, targets, cosine, difference):
    kwargs = {"network": network, "size": 32}
    _, ours = converted(f"{{type: inc_int8, targets: [{', '.join(targets)}], expect: {len(targets)}}}", **kwargs)
    graph = host_graph(session_with(**kwargs).convert(), targets, list(calibration(32)()))
    found = [
        n.args[1:3] for n in graph.graph.nodes if n.target is torch.ops.quantized_decomposed.quantize_per_tensor.default
    ]
    for layer in (m for m in ours.modules() if isinstance(m, (IntegerConv2d, IntegerLinear))):
        scale, zero_point = float(layer.input_scale), int(layer.input_zero_point)
        assert any(scale == pytest.approx(s, rel=1e-6) and zero_point == z for s, z in found)
    x = images(16, 32, seed=9)
    theirs, mine = torch.cat([graph(part) for part in x.split(4)]), ours(x)
    plain = session_with(**kwargs).convert()(x)
    apart, lost = float((theirs - mine).abs().max()), float((plain - mine).abs().max())
    print(f"{targets}: cosine {_cosine(theirs, mine):.8f}, largest difference {apart:.3g}, to float32 {lost:.3g}")
    assert _cosine(theirs, mine) >= cosine
    assert apart <= difference < lost


def _cosine(a, b):
    return float(nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), 0))


class ReadTwice(nn.Module):
    """A convolution whose output goes through a norm and past it, as in a residual network."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3), randomize_norms(nn.Sequential(nn.BatchNorm2d(8)))

    def forward(self, x):
        y = self.conv(x)
        return y + self.norm(y)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_upstream_folds_a_norm_into_a_convolution_that_others_read_and_ours_does_not():
    model, x = ReadTwice().eval(), images(4)
    theirs = host_graph(model, ["conv"], [x])(x)
    assert _cosine(theirs, model(x)) < 0.99
    assert look(model, ["conv"], x)["conv"].norm is None


@torch.no_grad()
@pytest.mark.parametrize("kind", ["inc_int8", "inc_dynamic_int8"])
def test_an_integer_layer_gives_what_the_frameworks_converted_layer_gives(kind):
    from bonn_plugin.passes import pt2e

    torch.manual_seed(0)
    for layer, x in (
        (nn.Conv2d(6, 8, 3, 2, 1, bias=False), images(4, 9, channels=6)),
        (nn.Conv2d(6, 12, (3, 1), padding=(2, 0), dilation=(2, 1), groups=3), images(4, 9, channels=6)),
        (nn.Linear(20, 7), torch.randn(4, 20)),
        (nn.Linear(20, 7, bias=False), torch.randn(2, 5, 20)),
    ):
        norm = randomize_norms(nn.Sequential(nn.BatchNorm2d(8)))[0].eval() if layer.weight.shape[0] == 8 else None
        with pt2e.hosted("test"):
            api = pt2e.quantization()
            config = (
                api.StaticQuantConfig() if kind == "inc_int8" else api.DynamicQuantConfig(w_granularity="per_channel")
            )
            prepared = api.prepare(pt2e._export(layer, norm, x), config)
            prepared(x)
            graph = api.convert(prepared)
        found = pt2e._read("layer", graph)
        from bonn_plugin.modifiers.integer_layers import empty_layer

        own = empty_layer(layer, norm, dynamic=kind != "inc_int8").fill(
            found.weight, found.weight_scale, found.bias, found.input_scale, found.input_zero_point
        )
        want = graph(x)
        assert own(x).shape == want.shape
        # only the order of float sums differs: theirs adds numbers, ours whole numbers, which is exact
        assert float((own(x) - want).abs().max()) <= 2e-6 * float(want.abs().max())
        exact = layer(x) if norm is None else norm(layer(x))
        assert 0 < float((own(x) - exact).abs().max()) < 0.05 * float(exact.abs().max())


def test_an_integer_convolution_against_loops():
    from bonn_plugin.nn import ConvGeometry

    generator = torch.Generator().manual_seed(0)
    layer = IntegerConv2d(ConvGeometry(2, 3, (3, 3), (2, 1), (1, 1), (1, 1), 1), bias=True, bias_stands_for=3)
    weight = torch.randint(-128, 128, (3, 2, 3, 3), generator=generator, dtype=torch.int8)
    scale, bias = torch.rand(3, generator=generator), torch.randn(3, generator=generator)
    layer.fill(weight, scale, bias, torch.tensor(0.25), torch.tensor(7, dtype=torch.uint8))
    x = torch.randn(1, 2, 5, 4, generator=generator) * 20
    got = layer(x)
    for o in range(3):
        for i in range(3):
            for j in range(4):
                total = 0
                for c in range(2):
                    for u in range(3):
                        for v in range(3):
                            row, column = 2 * i + u - 1, j + v - 1
                            if 0 <= row < 5 and 0 <= column < 4:
                                q = max(0, min(255, round(float(x[0, c, row, column]) / 0.25) + 7))
                                total += (q - 7) * int(weight[o, c, u, v])
                want = total * float(scale[o]) * 0.25 + float(bias[o])
                assert float(got[0, o, i, j]) == pytest.approx(want, rel=1e-5, abs=1e-4)


def test_sums_are_exact_where_float32_would_round():
    layer = IntegerLinear(2048, 1, bias=False)
    weight = torch.full((1, 2048), 127, dtype=torch.int8)
    layer.fill(weight, torch.ones(1), None, torch.tensor(1.0), torch.tensor(0, dtype=torch.uint8))
    x = torch.full((1, 2048), 255.0)
    x[0, 0] = 1
    assert float(layer(x)) == float(torch.tensor(127 * (255 * 2047 + 1)).float())


PASSES = {
    "inc_int8": INT8,
    "inc_dynamic_int8": "{type: inc_dynamic_int8}",
    "float16": "{type: inc_half}",
    "bfloat16": "{type: inc_half, dtype: bfloat16}",
    "weight only 8": "{type: inc_weight_only, group_size: -1}",
    "weight only 4": "{type: inc_weight_only, bits: 4, group_size: 5}",
}


@torch.no_grad()
@pytest.mark.parametrize("which", PASSES)
def test_a_reload_computes_what_was_converted_bit_for_bit_and_stores_no_wider_number(which, tmp_path):
    session, model = converted(PASSES[which])
    save_packed(model, tmp_path, session.recipe)
    again = load_packed(tmp_path)
    x = images(16, seed=5)
    assert torch.equal(model(x), again(x))
    assert verify_packed(tmp_path).identical
    assert not session.exact
    stored = safetensors.torch.load_file(tmp_path / WEIGHTS)
    want = {"inc_int8": torch.int8, "inc_dynamic_int8": torch.int8, "float16": torch.float16}
    want |= {"bfloat16": torch.bfloat16, "weight only 8": torch.int8, "weight only 4": torch.uint8}
    assert stored["fc.weight"].dtype == want[which]
    book = ledger(again)
    assert book.written_bytes == sum(t.numel() * t.element_size() for t in stored.values())
    original = session_with().model
    parameters = sum(p.numel() for n, p in original.named_parameters() if ".prior." not in n and "modulation" not in n)
    counted = book.select({Role.BINARY_WEIGHT, Role.INTEGER_WEIGHT, Role.REAL_WEIGHT, Role.NORM})
    assert sum(e.original_bits for e in counted) == 32 * parameters


@torch.no_grad()
@pytest.mark.parametrize("which", PASSES)
def test_the_forecast_stores_what_the_conversion_stores(which):
    session = session_with(PASSES[which])
    forecast = session.forecast(images(1))
    assert ledger(forecast) == ledger(session.convert(calibration()))


def test_half_layers_store_what_the_framework_computes_with():
    from neural_compressor.torch.quantization import MixedPrecisionConfig, quantize

    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 8, 3, padding=1), images(2)
    theirs = quantize(nn.Sequential(copy.deepcopy(layer)), MixedPrecisionConfig(dtype="fp16"))
    weight, bias = to_half("conv", layer, torch.float16)
    assert torch.equal(weight, theirs[0].weight.half())
    from bonn_plugin.nn import ConvGeometry

    own = HalfConv2d(ConvGeometry.of(layer), "float16", bias=True)
    own.weight, own.bias = weight, bias
    with torch.no_grad():
        want, got = theirs(x), own(x)
    # theirs rounds input and output to 16 bits too
    assert float((want - got).abs().max()) < 4e-3 * float(want.abs().max())
    with pytest.raises(ModelError, match=r"fc\.weight has values beyond torch\.float16: choose bfloat16"):
        to_half("fc", _filled(nn.Linear(2, 2), 1e6), torch.float16)


def _filled(layer, value):
    nn.init.constant_(layer.weight, value)
    return layer


@pytest.mark.parametrize(("bits", "group_size"), [(4, 16), (4, 7), (8, 50)])
def test_weight_only_layers_are_the_frameworks(bits, group_size):
    from neural_compressor.torch.quantization import RTNConfig, convert, prepare

    torch.manual_seed(0)
    layer = nn.Linear(50, 6)
    config = RTNConfig(bits=bits, group_size=group_size, use_sym=True, use_layer_wise=False)
    theirs = convert(prepare(nn.Sequential(copy.deepcopy(layer)), config))[0]
    found = round_to_nearest("fc", layer, bits, group_size)
    own = WeightOnlyLinear(50, 6, bits=bits, group_size=group_size, bias=True)
    from bonn_plugin.functional import pack_int4

    own.weight = found.integers if bits == 8 else pack_int4(found.integers)
    own.weight_scale, own.bias = found.scale, found.bias
    # theirs rounds the products of integer and scale to float16
    torch.testing.assert_close(own.dense_weight(), theirs.recover().float(), rtol=1e-3, atol=1e-6)
    x = torch.randn(3, 50)
    with torch.no_grad():
        torch.testing.assert_close(own(x), theirs(x), rtol=2e-3, atol=2e-3)


@torch.no_grad()
def test_a_norm_is_folded_only_where_nothing_else_reads_the_convolution():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))
            self.na, self.nb, self.nc, self.nd = (nn.BatchNorm2d(3) for _ in range(4))

        def forward(self, x):
            x = self.na(self.a(x))
            y = self.b(x)
            x = self.nb(y) + y
            x = self.nc(self.c(self.c(x)))
            return self.nd(self.nd(self.d(x)))

    seen = look(Net().eval(), ["a", "b", "c", "d"], images(2))
    assert {name: s.norm for name, s in seen.items()} == {"a": "na", "b": None, "c": None, "d": None}


@torch.no_grad()
def test_resnet18_with_an_int8_rest_is_22_times_smaller(tmp_path):
    rest = r"{type: inc_int8, targets: [conv1, 're:layer[2-4]\.0\.downsample\.1', fc], expect: 5}"
    network = "{name: bonn_resnet18, num_classes: 1000}"
    session, model = converted(rest, network=network, size=32)
    assert isinstance(model.conv1, IntegerConv2d)
    assert isinstance(model.bn1, FoldedNorm)
    assert sum(isinstance(m, PackedConv2d) for m in model.modules()) == 16
    save_packed(model, tmp_path, session.recipe)
    book = ledger(model)
    original = recipe_model(session.recipe)
    by_file = float32_file_bytes(original) / (tmp_path / WEIGHTS).stat().st_size
    print({str(rule): book.rate(rule) for rule in Rule}, by_file)
    assert all(book.rate(rule) >= 22 for rule in (Rule.PARAMETERS, Rule.WITH_SCALES))
    assert by_file >= 21.5
    counted = book.select({Role.BINARY_WEIGHT, Role.INTEGER_WEIGHT, Role.REAL_WEIGHT, Role.NORM})
    assert sum(e.original_bits for e in counted) == 32 * sum(p.numel() for p in original.parameters())
    merged = session_with("{type: filter_merge, keep: 0.5}", rest, network=network, size=32)
    for modifier in merged.modifiers:
        modifier.foresee()
    half = ledger(merged.forecast(images(1, 32)))
    print({str(rule): half.rate(rule) for rule in Rule})
    assert half.rate(Rule.PARAMETERS) >= 32


@torch.no_grad()
def test_two_passes_work_in_both_orders_on_different_layers_and_are_refused_on_one():
    int8, half = "{type: inc_int8, targets: [conv1]}", "{type: inc_half, targets: [fc]}"
    _, first = converted(int8, half)
    _, second = converted(half, int8)
    x = images(8, seed=3)
    assert isinstance(first.conv1, IntegerConv2d)
    assert isinstance(first.fc, HalfLinear)
    assert torch.equal(first(x), second(x))
    for a, b in ((int8, "{type: inc_half, targets: [conv1]}"), ("{type: inc_half, targets: [conv1]}", int8)):
        other = "inc_int8" if a == int8 else "inc_half"
        with pytest.raises(ModelError, match=f"conv1 is taken by an earlier {other}: one pass a layer"):
            session_with(a, b)
    session_with(int8, "{type: inc_half}")  # by default the later one takes what is left


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("layer1.0.conv1", "layer1.0.conv1 can't be taken by inc_int8: it is binarised"),
        ("conv2", "'conv2' matches no real layer of the model. Did you mean 'conv1'"),
        ("layer1.0.bn1", "layer1.0.bn1 can't be taken by inc_int8: it is a BatchNorm2d"),
        ("'re:layer1.*conv1'", "matches no real layer, only layer1.0.conv1 (BinaryConv2d)"),
        ("class:Conv3d", "matches no real layer of the model. The model's real layers are: Conv2d, Linear"),
    ],
)
def test_a_wrong_target_is_told_before_the_training_with_its_place(target, message):
    with pytest.raises(ModelError) as error:
        session_with(f"{{type: inc_int8, targets: [fc, {target}]}}")
    assert message in str(error.value)
    assert str(error.value).startswith("r.yaml:13:")


def test_targets_that_a_pass_does_not_support():
    with pytest.raises(ModelError, match="conv1 can't be taken by inc_weight_only: it is a Conv2d, and the pass"):
        session_with("{type: inc_weight_only, targets: [conv1]}")
    with pytest.raises(ModelError, match="expected 3 layers, the selectors match 1: fc"):
        session_with("{type: inc_half, targets: [fc], expect: 3}")


@pytest.mark.parametrize("kind", ["inc_int8", "inc_dynamic_int8", "inc_half", "inc_weight_only"])
def test_a_pass_before_binarize_is_a_mistake_of_the_recipe(kind):
    text = TINY.replace("  - {type: binarize}\n", f"  - {{type: {kind}}}\n  - {{type: binarize}}\n")
    with pytest.raises(BonnError) as error:
        parse_recipe(text, "r.yaml")
    assert f"{kind} needs a binarize before it in the list" in str(error.value)
    again = (
        TINY.partition("  - {type: kernel_loss")[0]
        + f"  - {{type: {kind}}}\n  - {{type: binarize, targets: [conv1]}}\n"
    )
    with pytest.raises(BonnError, match=f"binarize must stand before {kind} in the list"):
        parse_recipe(again, "r.yaml")


def test_calibration_that_is_missing_empty_or_not_finite():
    session = session_with(INT8)
    with pytest.raises(ModelError, match=r"r\.yaml:13:\d+: inc_int8 .*session\.convert\(calibration=\.\.\.\)"):
        session.convert()
    with pytest.raises(ModelError, match="gave no batch of images"):
        session.convert(lambda: iter(()))
    bad = images()
    bad[0, 0, 0, 0] = torch.nan
    with pytest.raises(ModelError, match="batch 2 of the calibration images has values that are not finite"):
        session.convert(lambda: iter((images(), bad)))
    with pytest.raises(ModelError, match="the network does not take the calibration images"):
        session.convert(lambda: iter((images(channels=4),)))
    session.convert(calibration())


@torch.no_grad()
def test_a_network_whose_way_depends_on_its_values_takes_the_passes_too():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return x + self.conv(x) if float(x.sum()) > -1e9 else x

    session = session_with(INT8)
    session.model.layer1[0].add_module("odd", Odd())
    session.model.layer1[0].register_forward_hook(lambda m, _, y: m.odd(y))
    model = session.convert(calibration())
    assert isinstance(model.layer1[0].odd.conv, nn.Conv2d)  # it came after the layers were chosen
    assert isinstance(model.conv1, IntegerConv2d)


def test_a_layer_that_the_network_does_not_call_is_named():
    recipe = recipe_with(INT8)
    model = randomize_norms(recipe_model(recipe))
    model.unused = nn.Conv2d(3, 3, 1)
    session = Session(recipe, 1)
    session.prepare(model)
    with pytest.raises(ModelError, match="unused is not reached by the forward pass"):
        session.convert(calibration())


def test_the_framework_leaves_nothing_behind_and_says_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    converted("{type: inc_int8, targets: [conv1]}", "{type: inc_weight_only, bits: 4}")
    converted("{type: inc_half}")
    assert list(tmp_path.iterdir()) == []
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


WITHOUT = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "neural_compressor" else real(name, *a)
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("neural_compressor", "torchao"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch
from bonn_plugin import load_packed, verify_packed, Session, load_recipe
from bonn_plugin.recipe import recipe_model
from bonn_plugin.errors import ModelError
assert verify_packed(sys.argv[1]).identical
load_packed(sys.argv[1])(torch.zeros(1, 3, 8, 8))
try:
    recipe = load_recipe(sys.argv[1] + "/recipe.yaml")
    Session(recipe, 1).prepare(recipe_model(recipe))
except ModelError as error:
    print(error)
assert not {n.split(".")[0] for n in sys.modules} & {"neural_compressor", "torchao"}
"""


def test_a_reload_needs_no_framework_and_preparing_without_it_says_how_to_install_it(tmp_path):
    session, model = converted(INT8)
    save_packed(model, tmp_path, session.recipe)
    done = subprocess.run([sys.executable, "-c", WITHOUT, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        'inc_int8 runs a pass of neural-compressor, which is not installed: pip install "bonn_plugin[inc]"'
        in done.stdout
    )


@torch.no_grad()
def test_dynamic_scales_depend_on_the_batch():
    _, model = converted("{type: inc_dynamic_int8, targets: [conv1]}")
    x = images(2)
    assert not torch.equal(model(torch.cat([x, 100 * x]))[:2], model(x))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_dynamic_int8_is_what_the_framework_makes_of_the_whole_network():
    kwargs = {"network": ONE_BLOCK, "size": 32}
    _, ours = converted("{type: inc_dynamic_int8, targets: [conv1, fc]}", **kwargs)
    x = images(4, 32)
    theirs = host_graph(session_with(**kwargs).convert(), ["conv1", "fc"], [x], dynamic=True)(x)
    print(f"dynamic: cosine {_cosine(theirs, ours(x)):.8f}, difference {float((theirs - ours(x)).abs().max()):.3g}")
    assert _cosine(theirs, ours(x)) >= 0.9999


RUN = RECIPE + "  - {type: inc_int8, targets: [conv1], calibration_batches: 2}\n  - {type: inc_half}\n"


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_a_run_with_passes_from_the_recipe_to_the_report(tmp_path, monkeypatch, capsys):
    (tmp_path / "r.yaml").write_text(RUN)
    command, folder = Command(monkeypatch, capsys), tmp_path / "run"
    seen = command("check", tmp_path / "r.yaml")
    assert seen.status == 0, seen.err
    assert "after the training" in seen.out
    done = command("compress", tmp_path / "r.yaml", "--out", folder)
    assert done.status == 0, done.err
    report = json.loads((folder / "report.json").read_text())
    assert report["accuracy"]["identical_logits"]
    assert 0 < report["accuracy"]["conversion_difference"] < 2
    assert {"integer weight", "binary weight"} <= {row["role"] for row in report["roles"]}
    rates = [line.split(": ")[1] for line in seen.out.splitlines() if line.startswith("compression rate by")]
    assert rates == [f"{row['rate']:.2f}" for row in report["rates"]]
    for what in ("verify", "evaluate", "report"):
        assert command(what, folder).status == 0
    text = (folder / "report.md").read_text()
    assert "largest change of a logit by the passes after training" in text
    assert "IntegerConv2d" in text


@torch.no_grad()
def test_a_training_starts_from_half_layers_and_not_from_a_folded_norm(tmp_path):
    session, model = converted("{type: inc_half}")
    save_packed(model, tmp_path / "half", session.recipe)
    state = load_weights(tmp_path / "half")
    assert state["fc.weight"].dtype == torch.float32
    assert torch.equal(state["fc.weight"], session.model.fc.weight.half().float())
    session, model = converted("{type: inc_int8, targets: [conv1]}", network=SMALL_RESNET, size=32)
    save_packed(model, tmp_path / "int8", session.recipe)
    with pytest.raises(CheckpointError, match="bn1 was folded into an int8 convolution"):
        load_weights(tmp_path / "int8")
    session, model = converted("{type: inc_int8, targets: [fc]}")
    save_packed(model, tmp_path / "fc", session.recipe)
    state = load_weights(tmp_path / "fc")
    torch.testing.assert_close(state["fc.weight"], session.model.fc.weight, rtol=0, atol=0.01)
    assert "fc.input_scale" not in state


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("integer_linear", {"in_features": 0, "out_features": 3}),
        ("integer_linear", {"in_features": 2, "out_features": "3"}),
        ("integer_linear", {"in_features": 2, "out_features": 3, "bias_stands_for": 3}),
        ("integer_conv2d", {"in_channels": 3}),
        ("half_linear", {"in_features": 2, "out_features": 3, "dtype": "float8"}),
        ("weight_only_linear", {"in_features": 2, "out_features": 3, "bits": 3, "group_size": 1}),
        ("weight_only_linear", {"in_features": 2, "out_features": 3, "bits": 4, "group_size": 5}),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(kind, spec):
    with pytest.raises(ValueError, match=r"\w"):
        replacement_class(kind).from_spec(spec)
