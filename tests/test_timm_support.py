"""Whatever convolutions a network of timm has: handled exactly, or left alone with a reason."""

import re
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import CondConv2d, Conv2dSame, MixedConv2d, ScaledStdConv2d, StdConv2d
from torch import nn
from torch.nn.utils import prune

from bonn_plugin import Session, load_packed, parse_recipe, save_packed
from bonn_plugin.check import LARGEST_RUN, forecast_model
from bonn_plugin.errors import BonnError, ModelError
from bonn_plugin.models import build_outline
from bonn_plugin.modifiers import left_alone, select_convolutions
from bonn_plugin.nn import BinaryConv2d, ConvGeometry, HalfConv2d, IntegerConv2d, PackedConv2d, replace_module
from bonn_plugin.nn.inputs import image_channels, image_size
from bonn_plugin.nn.modes import evaluating
from bonn_plugin.nn.sparse import SparseConv2d
from tests.small import Command

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "timm_support.md"

RECIPE = """version: 1
name: kinds
model: {{name: {name}, num_classes: 4{args}}}
data: {{name: imagefolder, root: ., crop: {size}}}
training: {{epochs: 1, batch_size: 2, optimizer: {{name: sgd, lr: 1e-3}}, schedule: {{name: constant}}}}
modifiers:
  - {{type: binarize}}
  - {{type: kernel_loss, lambda: 1e-4, nu: 1e-3}}
"""


def recipe(name="resnet18", size=16, args=""):
    return parse_recipe(RECIPE.format(name=name, size=size, args=args), "kinds.yaml")


class Around(nn.Module):
    """A stem, a layer of 8 channels in the middle, a classifier."""

    def __init__(self, layer):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = layer
        self.head = nn.LazyLinear(4)

    def forward(self, x):
        return self.head(self.middle(self.stem(x)).mean((2, 3)))


def around(layer):
    torch.manual_seed(0)
    model = Around(layer)
    model(torch.randn(2, 3, 16, 16))
    return model


def reasons(model):
    return {alone.name: alone.reason for alone in left_alone(model, torch.randn(2, 3, 16, 16))}


def trained(model, made, steps=2):
    """Two steps of training; returns the session."""
    session = Session(made, steps)
    size = made.data.image_size
    session.prepare(model)
    optimizer = torch.optim.SGD(session.param_groups(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        y = torch.tensor([0, 1])
        loss = nn.functional.cross_entropy(model(torch.randn(2, 3, size, size)), y) + session.loss(labels=y).total
        loss.backward()
        optimizer.step()
        session.step()
    return session


def slow_convolution(x, conv, threshold):
    """w̄ times the convolution of signs, in float64, position by position."""
    kh, kw = conv.kernel_size
    padding = conv.padding
    if isinstance(padding, str):
        padding = [0, 0] if padding == "valid" else [d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size)]
    signs = torch.where(x - threshold[:, None, None] >= 0, 1.0, -1.0).double()
    signs = nn.functional.pad(signs, (padding[1], padding[1], padding[0], padding[0]))
    conv.requires_grad_(False)
    weight = torch.where(conv.weight >= 0, 1.0, -1.0).double()
    (dh, dw), (sh, sw) = conv.dilation, conv.stride
    height = (signs.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (signs.shape[3] - dw * (kw - 1) - 1) // sw + 1
    out = torch.zeros(len(x), conv.out_channels, height, width, dtype=torch.double)
    share_in, share_out = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    for f in range(conv.out_channels):
        first = f // share_out * share_in
        for i in range(height):
            for j in range(width):
                rows = slice(i * sh, i * sh + dh * (kh - 1) + 1, dh)
                columns = slice(j * sw, j * sw + dw * (kw - 1) + 1, dw)
                window = signs[:, first : first + share_in, rows, columns]
                out[:, f, i, j] = (window * weight[f]).sum((1, 2, 3))
    out = out * float(conv.weight.abs().mean())
    return out if conv.bias is None else out + conv.bias.double()[:, None, None]


HANDLED = {
    "grouped": {"kernel_size": 3, "groups": 4, "padding": 1},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "asymmetric kernel": {"kernel_size": (1, 7), "padding": (0, 3)},
    "asymmetric stride, padding and dilation": {
        "kernel_size": (3, 5),
        "stride": (2, 1),
        "padding": (0, 4),
        "dilation": (1, 2),
    },
    "padding same": {"kernel_size": (3, 5), "padding": "same", "dilation": (2, 1)},
    "padding valid": {"kernel_size": 2, "padding": "valid", "stride": 2},
    "bias": {"kernel_size": 3, "bias": True},
    "no bias, one output": {"kernel_size": 3, "bias": False, "out_channels": 1},
}


@pytest.mark.parametrize("kind", HANDLED)
def test_a_convolution_of_this_kind_is_computed_exactly_in_training_and_packed(kind):
    torch.manual_seed(1)
    conv = nn.Conv2d(8, **{"out_channels": 8, **HANDLED[kind]})
    x = torch.randn(2, 8, 9, 10)
    expected = slow_convolution(x, conv, torch.zeros(8))
    assert conv(x).shape == expected.shape
    layer = BinaryConv2d(conv)
    assert torch.allclose(layer(x).double(), expected, atol=1e-5)
    assert torch.equal(layer.pack()(x), layer.eval()(x))


@pytest.mark.parametrize("kind", HANDLED)
def test_a_network_with_this_kind_is_taken_and_gives_the_same_logits_packed(kind):
    made = recipe()
    model = around(nn.Conv2d(8, **{"out_channels": 8, **HANDLED[kind]}))
    session = trained(model, made)
    assert BinaryConv2d.names_in(model) == ["middle"]
    model.eval()
    x = torch.randn(2, 3, 16, 16)
    assert torch.allclose(session.convert()(x), model(x), atol=1e-6)


def weight_normed(conv):
    return nn.utils.parametrizations.weight_norm(conv)


def pruned(conv):
    prune.random_unstructured(conv, "weight", 0.5)
    return conv


def hooked(conv):
    conv.register_forward_hook(lambda module, args, output: output * 2)
    return conv


LEFT_ALONE = {
    "Conv2dSame": (lambda: Conv2dSame(8, 8, 3, stride=2), "it is a Conv2dSame, whose forward pass is its own"),
    "StdConv2d": (lambda: StdConv2d(8, 8, 3), "it is a StdConv2d, whose forward pass is its own"),
    "ScaledStdConv2d": (lambda: ScaledStdConv2d(8, 8, 3), "it is a ScaledStdConv2d, whose forward pass is its own"),
    "CondConv2d": (lambda: Routed(CondConv2d(8, 8, 3)), "it is a CondConv2d, not a two-dimensional convolution"),
    "transposed": (
        lambda: nn.ConvTranspose2d(8, 8, 3),
        "it is a ConvTranspose2d, not a two-dimensional convolution",
    ),
    "same, even kernel": (
        lambda: nn.Conv2d(8, 8, 2, padding="same"),
        "padding 'same' with an even kernel pads one side more than the other",
    ),
    "reflecting": (
        lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        "padding mode 'reflect' is not supported: only zeros",
    ),
    "depthwise": (lambda: nn.Conv2d(8, 16, 3, groups=8), "depthwise"),
    "1x1": (lambda: nn.Conv2d(8, 8, 1), "1x1"),
    "weight norm": (
        lambda: weight_normed(nn.Conv2d(8, 8, 3)),
        "it is a ParametrizedConv2d, whose forward pass is its own",
    ),
    "pruning mask": (lambda: pruned(nn.Conv2d(8, 8, 3)), "its weight is computed from other tensors"),
    "hooks": (lambda: hooked(nn.Conv2d(8, 8, 3)), "it has hooks, which would be lost"),
    "weight read by its parent": (
        lambda: Reads(nn.Conv2d(8, 8, 3)),
        "its weight is computed with outside of its own call",
    ),
    "never called": (lambda: Idle(nn.Conv2d(8, 8, 3)), "not called by the forward pass"),
}


class Routed(nn.Module):
    """What an EfficientNet does with experts."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x, torch.ones(len(x), self.conv.num_experts))


class Reads(nn.Module):
    """Calls its convolution, and computes with its weight besides."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x) + nn.functional.conv2d(x, self.conv.weight.data)


class Idle(Reads):
    """Has a convolution that it does not use."""

    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_a_convolution_of_this_kind_is_left_alone_with_a_reason(kind):
    make, reason = LEFT_ALONE[kind]
    model = around(nn.Sequential(make(), nn.Conv2d(16 if kind == "depthwise" else 8, 8, 3)))
    session = trained(model, recipe())
    assert BinaryConv2d.names_in(model) == ["middle.1"]
    found = reasons(model)
    assert found.pop("stem") == "the network's first convolution"
    assert list(found.values()) == [reason]
    packed, x = session.convert(), torch.randn(2, 3, 16, 16)
    assert torch.allclose(packed(x), model.eval()(x), atol=1e-6)


def test_the_convolutions_within_a_mixed_convolution_are_taken_one_by_one():
    model = around(MixedConv2d(8, 8, [3, 5]))
    trained(model, recipe())
    assert BinaryConv2d.names_in(model) == ["middle.0", "middle.1"]


def test_a_convolution_with_another_ones_weight_is_left_alone():
    tied = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    tied[1].weight = tied[0].weight
    model = around(tied)
    assert list(select_convolutions(model, None)) == ["middle.2"]
    assert reasons(model)["middle.1"] == "another module has the same weight"


@pytest.mark.parametrize("kind", ["weight read by its parent", "Conv2dSame", "pruning mask", "hooks"])
def test_naming_what_can_not_be_binarised_is_an_error_with_the_reason(kind):
    make, reason = LEFT_ALONE[kind]
    model = around(make())
    name = "middle.conv" if kind.startswith("weight") else "middle"
    with pytest.raises(ModelError, match=f"{name} can't be binarised: {re.escape(reason)}"):
        select_convolutions(model, [name], example=torch.randn(2, 3, 16, 16))


def test_every_branch_of_the_stem_is_left_alone():
    class Stem(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(3, 4, 5, padding=2), nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            return torch.cat([self.wide(x), self.narrow(x)], 1)

    model = Around(nn.Conv2d(8, 8, 3))
    model.stem = Stem()
    assert list(select_convolutions(model, None)) == ["middle"]
    assert {a.name: a.reason for a in left_alone(model)} == {
        "stem.wide": "the network's first convolution",
        "stem.narrow": "it sees the image, as the first does",
        "middle": "not selected",
    }


def test_a_look_at_dtype_and_shape_of_a_weight_is_no_use_of_it():
    class Looks(Reads):
        def forward(self, x):
            weight = self.conv.weight
            assert weight.shape[1] == x.shape[1]
            assert weight.dim() == 4
            x = x.to(weight.device, weight.dtype).to(weight).type_as(weight)
            return self.conv(x + weight.new_zeros(1) + torch.zeros_like(weight)[0, 0, 0, 0])

    model = around(Looks(nn.Conv2d(8, 8, 3)))
    session = trained(model, recipe())
    assert BinaryConv2d.names_in(model) == ["middle.conv"]
    session.convert()(torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize(
    "use", ["data", "T", "to", "view"], ids=["its data", "its transpose", "a copy of another dtype", "a view"]
)
def test_reading_the_values_of_a_weight_is_a_use_of_it(use):
    reads = {
        "data": lambda weight: weight.data,
        "T": lambda weight: weight.mT,
        "to": lambda weight: weight.to(torch.float64),
        "view": lambda weight: weight.flatten(),
    }

    class Uses(Reads):
        def forward(self, x):
            return self.conv(x) * reads[use](self.conv.weight).sum().to(x)

    model = around(nn.Sequential(Uses(nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 8, 3)))
    assert list(select_convolutions(model, None, example=torch.randn(2, 3, 16, 16))) == ["middle.1"]


@pytest.mark.parametrize("kind", HANDLED)
def test_code_that_reads_attributes_of_a_convolution_reads_the_same_of_the_layers_in_its_place(kind):
    conv = nn.Conv2d(8, **{"out_channels": 8, **HANDLED[kind]})
    for layer in (BinaryConv2d(conv), BinaryConv2d(conv).pack()):
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups", "padding_mode"):
            assert getattr(layer, name) == getattr(conv, name), name
        if not isinstance(conv.padding, str):
            assert layer.padding == conv.padding
        assert layer.weight.shape == conv.weight.shape
        assert layer.weight.dtype == conv.weight.dtype


def test_layers_of_the_passes_after_training_have_a_convolutions_attributes_too():
    conv = nn.Conv2d(8, 8, (3, 1), stride=(2, 1), padding=(1, 0), groups=2)
    geometry = ConvGeometry.of(conv)
    for layer in (
        IntegerConv2d(geometry, bias=True),
        HalfConv2d(geometry, "float16", bias=True),
        SparseConv2d(geometry, 4, True),
    ):
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            assert getattr(layer, name) == getattr(conv, name), name


def test_a_convolution_that_is_called_twice_is_probed_by_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            return self.conv(self.conv(x).relu())

    model = around(Twice())
    session = trained(model, recipe())
    assert model.middle.conv.threshold is None  # the first call sees both signs
    packed, x = session.convert(), torch.randn(2, 3, 16, 16)
    assert torch.allclose(packed(x), model.eval()(x), atol=1e-6)


def test_a_convolution_under_two_names_is_replaced_under_both():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    model = around(nn.Sequential(conv, nn.ReLU(), conv))
    session = trained(model, recipe())
    assert model.middle[0] is model.middle[2]
    packed = session.convert()
    assert isinstance(packed.middle[2], PackedConv2d)
    assert packed.middle[0] is packed.middle[2]


def test_one_image_without_a_batch_is_convolved_as_torch_does():
    layer = BinaryConv2d(nn.Conv2d(8, 4, 3), threshold=True)
    x = torch.randn(8, 6, 6)
    assert layer(x).shape == (4, 4, 4)
    layer.eval()
    assert torch.equal(layer(x), layer(x[None])[0])
    assert torch.equal(layer.pack()(x), layer(x))


class Caching(nn.Module):
    """Keeps what eval mode computes from its weights, as LeViT and its kin do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)
        self.bias = nn.Parameter(torch.zeros(8))
        self.cache = {}

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x):
        bias = 2 * self.bias if self.training else self.cache.setdefault("bias", 2 * self.bias)
        return self.conv(x) + bias[:, None, None]


def test_what_eval_mode_has_cached_is_gone_after_a_look_at_the_network():
    model = around(Caching())
    with evaluating(model):
        model(torch.randn(2, 3, 16, 16))
        assert model.middle.cache
    assert not model.middle.cache
    assert model.training


def test_a_network_that_keeps_tensors_of_eval_mode_can_be_converted_after_an_evaluation():
    model = around(Caching())
    session = trained(model, recipe())
    model.eval()
    x = torch.randn(2, 3, 16, 16)
    model(x)  # with gradients: what is kept can't be copied
    with torch.no_grad():
        model.middle.bias.add_(1)
    packed = session.convert()
    assert not model.training
    assert torch.allclose(packed(x), model(x), atol=1e-6)


SMALL = {
    "test_resnet": (32, ""),
    "test_byobnet": (32, ""),
    "test_efficientnet": (32, ""),
    "davit_tiny": (32, ", args: {depths: [1, 1, 1, 1], embed_dims: [16, 16, 32, 32], num_heads: [1, 1, 2, 2]}"),
    "levit_128s": (224, ", args: {depth: [1, 1, 1], embed_dim: [16, 16, 16], num_heads: [1, 1, 1]}"),
    "repvgg_a0": (32, ""),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_network_of_timm_trains_and_gives_the_same_logits_after_the_reload(name, tmp_path):
    size, args = SMALL[name]
    made = recipe(name, size, args)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **made.model.args)
    session = trained(model, made)
    packed = session.convert()
    save_packed(packed, tmp_path, made)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        logits = packed(x)
        assert torch.equal(load_packed(tmp_path)(x), logits)
        assert torch.allclose(model.eval()(x), logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "args", "channels"),
    [("resnet18", {}, 3), ("resnet18", {"in_chans": 1}, 1), ("resnet18", {"in_chans": 12}, 12), ("tresnet_m", {}, 3)],
)
def test_the_channels_of_the_images_are_known_whatever_the_first_convolution_sees(name, args, channels):
    model = build_outline(name, 4, args)
    assert image_channels(model, args, (64, 64)) == channels
    if name == "resnet18" and args:
        built = timm.create_model("test_resnet", **args)
        assert image_channels(built, {}, (64, 64)) == channels


def test_the_size_of_the_images_is_what_timm_states():
    assert image_size(build_outline("inception_v3", 4)) == (299, 299)
    assert image_size(nn.Conv2d(3, 3, 3)) == (224, 224)


def test_an_outline_takes_no_memory_and_has_the_shapes():
    outline = build_outline("eva_giant_patch14_224", 10)
    assert all(p.is_meta for p in outline.parameters())
    assert sum(p.numel() for p in outline.parameters()) > 1e9


def test_a_module_under_a_name_that_does_not_exist_can_not_be_replaced():
    with pytest.raises(AttributeError):
        replace_module(nn.Sequential(), "conv", nn.ReLU())


# the command


def test_check_shows_any_network_of_timm(monkeypatch, capsys):
    done = Command(monkeypatch, capsys)("check", "--model", "test_resnet", "--num-classes", "10", "--size", "64x96")
    assert done.status == 0
    assert done.out.startswith("test_resnet: ")
    assert "compression rate by parameters: " in done.out
    assert "modifier" not in done.out


def test_check_tells_near_names_of_a_typo(monkeypatch, capsys):
    done = Command(monkeypatch, capsys)("check", "--model", "resnt18")
    assert done.status == 2
    assert done.lines == [done.err.strip()]
    assert done.err.startswith("timm has no model named 'resnt18'. Did you mean 'resnet18'")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("vit_tiny_patch16_224", "the network's first convolution: 1"),
        ("eva_giant_patch14_560", "the network's first convolution: 1"),
        ("mixer_s32_224", "the network's first convolution: 1"),
        ("convmixer_768_32", "depthwise: 32; 1x1: 32; the network's first convolution: 1"),
        ("nf_resnet26", "1x1"),
    ],
)
def test_a_network_without_plain_convolutions_says_so_in_one_line(name, why, monkeypatch, capsys):
    done = Command(monkeypatch, capsys)("check", "--model", name)
    assert done.status == 2
    assert done.out == ""
    (line,) = done.lines
    assert line.startswith(f"{name}: no convolution is taken by default: ")
    assert why in line


def test_a_network_too_large_to_build_is_told_from_its_shapes(monkeypatch):
    monkeypatch.setattr("bonn_plugin.check.build_model", None)
    seen = forecast_model("regnety_2560", 1000)
    assert seen.parameters > LARGEST_RUN
    assert {layer.remark for layer in seen.layers} == {"not looked at: the network is too large to run here"}
    assert seen.book.rate() == pytest.approx(1.30, abs=0.005)
    assert seen.after.real + seen.after.binary == seen.before.real


def test_shapes_alone_give_the_rates_and_operations_that_a_built_network_gives(monkeypatch, capsys):
    command = Command(monkeypatch, capsys)
    built = command("check", "--model", "resnet18", "--size", "64x64").out.splitlines()[-5:]
    monkeypatch.setattr("bonn_plugin.check.LARGEST_RUN", 1)
    outlined = command("check", "--model", "resnet18", "--size", "64x64").out.splitlines()[-5:]
    assert outlined[0] == built[0]  # by parameters: learned thresholds are not among them
    assert outlined[4] == built[4]  # operations


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ((), "bonn check needs a recipe or --model NAME"),
        (("digits_wrn22_16", "--model", "resnet18"), "bonn check needs a recipe or --model NAME, not both"),
        (("--model", "resnet18", "--set", "training.epochs=2"), "--set changes a recipe; with --model there is none"),
        (("digits_wrn22_16", "--size", "32x32"), "--size goes with --model; a recipe states its own"),
        (("digits_wrn22_16", "--num-classes", "3"), "--num-classes goes with --model; a recipe states its own"),
        (("--model", "resnet18", "--size", "64"), "--size '64' is not HxW, such as 224x224"),
    ],
)
def test_options_of_check_that_do_not_fit_are_told_in_one_line(args, line, monkeypatch, capsys):
    done = Command(monkeypatch, capsys)("check", *args)
    assert (done.status, done.lines) == (2, [line])


def test_a_size_that_a_network_does_not_take_is_told_in_one_line(monkeypatch, capsys):
    done = Command(monkeypatch, capsys)("check", "--model", "efficientformerv2_s0", "--size", "64x64")
    assert done.status == 2
    (line,) = done.lines
    assert line.startswith("efficientformerv2_s0: the model does not take an input of shape (1, 3, 64, 64): ")


# the sweep and its page


def test_the_page_of_families_lists_every_module_of_timm():
    text = PAGE.read_text()
    version = re.search(r"timm (\d\S*),", text)[1]
    if version != timm.__version__:
        pytest.skip(f"docs/timm_support.md was written with timm {version}, installed is {timm.__version__}")
    _, *rows = re.findall(r"^\| (\w+) \| (\w+) \|.*\| ([^|]*) \|$", text, re.MULTILINE)
    theirs = [m for m in timm.list_modules() if any(not n.startswith("bonn_") for n in timm.list_models(module=m))]
    assert [family for family, _, _ in rows] == theirs
    assert all(model in timm.list_models(module=family) for family, model, _ in rows)
    results = Counter(result.partition(":")[0] for _, _, result in rows)
    passed, tried, none = re.search(r"\*\*(\d+) passed of (\d+) tried; (\d+) of", text).groups()
    assert results["passed"] == int(passed)
    assert results["passed"] + results["failed"] == int(tried)
    assert results["not applicable"] == int(none)


def test_the_sweep_says_of_a_family_without_plain_convolutions_that_it_is_not_applicable():
    from benchmarks.timm_sweep import NOT_APPLICABLE, try_family

    row = try_family("convmixer")
    assert (row.result, row.reason) == (NOT_APPLICABLE, "no plain convolution larger than 1x1")


def test_the_sweep_of_one_network_passes_and_its_page_counts_it():
    from benchmarks.timm_sweep import FAILED, PASSED, Member, Row, page, try_member

    row = try_member("resnet", Member("test_resnet", 1, 1, {}))
    assert (row.result, row.binarised, row.reason) == (PASSED, 9, "")
    text = page([row, Row("vgg", FAILED, "a reason", "vgg11")])
    assert "**1 passed of 2 tried; 0 of 2 families are not applicable.**" in text
    assert "| vgg | vgg11 |  | 0 |  |  | failed: a reason |" in text


@pytest.mark.slow
def test_every_family_of_timm_passes_or_has_no_plain_convolution():
    from benchmarks.timm_sweep import FAILED, GIB, families, in_process

    failed = [row for row in (in_process(family, 420, 12 * GIB) for family in families()) if row.result == FAILED]
    assert not failed


def test_an_unknown_network_is_no_outline():
    with pytest.raises(BonnError, match="timm has no model named"):
        build_outline("resnt18", 10)
