"""The export of layers that a pass quantised: 8-bit kernels, and the integers that torch computes with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("openvino")

from bonn_plugin import save_packed
from bonn_plugin.errors import ExportError
from bonn_plugin.export.engine import compile_for_cpu, core
from bonn_plugin.export.int8 import convolutions_in_int8
from bonn_plugin.export.integer import integers_of
from bonn_plugin.export.lowering import build_graph
from bonn_plugin.export.openvino import export_openvino, load, prefer_direct_stem, read_info, verify_export
from bonn_plugin.export.selftest import self_test
from bonn_plugin.functional import pack_int4, quantize_affine
from bonn_plugin.nn import ConvGeometry, HalfConv2d, HalfLinear, IntegerConv2d, IntegerLinear, WeightOnlyLinear
from tests.small import Command
from tests.test_passes import SMALL_RESNET, converted, images, session_with

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
NETWORK = {"network": SMALL_RESNET, "size": 32}


def integer_conv(geometry: ConvGeometry, zero_point: int = 77, bias: bool = True, seed: int = 0) -> IntegerConv2d:
    g = torch.Generator().manual_seed(seed)
    layer = IntegerConv2d(geometry, bias=bias, bias_stands_for=geometry.out_channels if bias else 0)
    return layer.fill(
        torch.randint(-128, 128, geometry.weight_shape, generator=g, dtype=torch.int8),
        torch.rand(geometry.out_channels, generator=g) * 0.01 + 0.001,
        torch.randn(geometry.out_channels, generator=g) if bias else None,
        torch.tensor(0.02),
        torch.tensor(zero_point, dtype=torch.uint8),
    ).eval()


def integer_linear(inputs: int, outputs: int, seed: int = 0) -> IntegerLinear:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (outputs, inputs), generator=g, dtype=torch.int8)
    layer = IntegerLinear(inputs, outputs, bias=True, bias_stands_for=outputs)
    scale, bias = torch.rand(outputs, generator=g) * 0.01, torch.randn(outputs, generator=g)
    return layer.fill(weight, scale, bias, torch.tensor(0.02), torch.tensor(100, dtype=torch.uint8)).eval()


def by_engine(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    graph = prefer_direct_stem(build_graph(model, tuple(x.shape))[0])
    return torch.from_numpy(compile_for_cpu(graph, 1)(x.numpy())[0].copy())


@torch.no_grad()
@pytest.mark.parametrize("zero_point", [0, 77, 128, 255])
@pytest.mark.parametrize(
    "geometry",
    [
        ConvGeometry(3, 16, (7, 7), (2, 2), (3, 3), (1, 1), 1),
        ConvGeometry(16, 24, (1, 1), (1, 1), (0, 0), (1, 1), 1),
        ConvGeometry(8, 8, (3, 3), (1, 1), (1, 1), (1, 1), 8),
        ConvGeometry(8, 12, (3, 1), (1, 2), (2, 0), (2, 1), 4),
    ],
)
def test_an_integer_convolution_gives_torchs_sums(geometry: ConvGeometry, zero_point: int) -> None:
    model = nn.Sequential(integer_conv(geometry, zero_point), nn.PReLU(geometry.out_channels))
    x = images(2, 12, seed=1, channels=geometry.in_channels)
    want = model(x)
    # no value of this noise is a tie, so that no integer differs
    assert float((by_engine(model, x) - want).abs().max()) <= 2e-6 * float(want.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("shape", [(3, 40), (2, 5, 40)])
def test_an_integer_linear_layer_gives_torchs_sums(shape: tuple[int, ...]) -> None:
    model, x = nn.Sequential(integer_linear(40, 9)), torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    want = model(x)
    assert float((by_engine(model, x) - want).abs().max()) <= 2e-6 * float(want.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [40, 8, 7])
def test_a_weight_only_layer_of_any_grouping(bits: int, group_size: int) -> None:
    g = torch.Generator().manual_seed(0)
    layer = WeightOnlyLinear(40, 6, bits=bits, group_size=group_size, bias=True)
    integers = torch.randint(-(1 << bits - 1), 1 << bits - 1, (6, 40), generator=g, dtype=torch.int8)
    layer.weight = integers if bits == 8 else pack_int4(integers)
    layer.weight_scale = torch.rand(layer.weight_scale.shape, generator=g).half()
    layer.bias = torch.randn(6, generator=g).half()
    x = torch.randn(3, 40, generator=g)
    torch.testing.assert_close(by_engine(nn.Sequential(layer), x), layer(x), rtol=1e-5, atol=1e-4)
    graph = prefer_direct_stem(build_graph(nn.Sequential(layer), tuple(x.shape))[0])
    users = core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})  # settings of ours left out
    torch.testing.assert_close(torch.from_numpy(users(x.numpy())[0]), layer(x), rtol=1e-5, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_layers_with_groups_and_bias(dtype: str) -> None:
    conv = HalfConv2d(ConvGeometry(8, 8, (3, 3), (1, 1), (1, 1), (1, 1), 4), dtype, bias=True)
    linear = HalfLinear(8, 5, dtype, bias=True)
    for layer in (conv, linear):
        layer.weight.normal_()
        assert layer.bias is not None
        layer.bias.normal_()
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    x = images(2, 6, channels=8)
    torch.testing.assert_close(by_engine(model, x), model(x), rtol=1e-5, atol=1e-5)


def test_the_engines_integers_are_those_that_the_self_test_takes_them_for() -> None:
    x = torch.randn(1, 8, 64, 64, generator=torch.Generator().manual_seed(5))
    layer = integer_conv(ConvGeometry(8, 8, (1, 1), (1, 1), (0, 0), (1, 1), 1), 100, bias=False)
    layer.weight = torch.eye(8, dtype=torch.int8)[:, :, None, None].contiguous()
    layer.weight_scale = torch.linspace(1, 2, 8)
    found = by_engine(nn.Sequential(layer), x) / layer.weight_scale[:, None, None] / layer.input_scale
    scale = layer.input_scale.double()
    low, high = (torch.tensor(float(n * scale)).float().numpy() for n in (-100, 155))
    assert torch.equal(found.round(), integers_of(x.numpy(), low, high) - 100)


@torch.no_grad()
def test_the_int8_rest_runs_in_8_bits_and_is_stored_in_8(tmp_path) -> None:
    session, model = converted("{type: inc_int8}", **NETWORK)
    save_packed(model, tmp_path, session.recipe)
    info = export_openvino(model, tmp_path, (1, 3, 32, 32), [images(8, 32, 3)])
    assert set(info.real_layers.values()) == {"int8"}
    assert len(info.real_layers) == 5
    assert set(info.binary_layers.values()) == {"bits"}
    assert read_info(tmp_path) == info
    compiled = compile_for_cpu(prefer_direct_stem(build_graph(model, (1, 3, 32, 32))[0]), 1)
    assert convolutions_in_int8(compiled) == (5, 5)  # the linear layer is one of them
    kinds = {op.get_rt_info()["layerType"].astype(str) for op in compiled.get_runtime_model().get_ops()}
    assert "BinaryConvolution" in kinds
    plain = session_with(**NETWORK).convert()
    export_openvino(plain, tmp_path / "plain", (1, 3, 32, 32), [images(2, 32, 3)])
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, (IntegerConv2d, IntegerLinear)))
    sizes = [(f / "openvino" / "model.bin").stat().st_size for f in (tmp_path / "plain", tmp_path)]
    assert sizes[0] - sizes[1] > 2.8 * weights
    assert verify_export(model, tmp_path, [images(4, 32, 9)]).agreement == 100
    logits = load(tmp_path)(images(3, 32, 11))
    assert torch.equal(logits.argmax(1), model(images(3, 32, 11)).argmax(1))


class OnTheEdge(nn.Module):
    """Puts every value on the middle of two integers, up to rounding, and scales it up behind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = integer_conv(ConvGeometry(3, 4, (1, 1), (1, 1), (0, 0), (1, 1), 1))
        self.flatten = nn.Flatten()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.flatten(self.conv(x))
        return y


@torch.no_grad()
def test_integers_on_which_rounding_decides_are_proven_and_others_are_an_error() -> None:
    model = OnTheEdge()
    g = torch.Generator().manual_seed(0)
    steps = torch.randint(-70, 170, (4, 3, 40, 40), generator=g) + 0.5
    x = (steps * model.conv.input_scale).float()
    graph = build_graph(model, (1, 3, 40, 40))[0]
    found = self_test(model, graph, (1, 3, 40, 40), [x], "edges")
    assert found.tied_integers > 0
    assert found.tied_signs == 0
    assert "integers whose value is the middle of two within rounding" in str(found)
    assert found.difference <= 1e-4 * found.scale
    other = OnTheEdge()
    other.conv.input_scale = model.conv.input_scale * 1.01
    with pytest.raises(ExportError, match="signs or integers differ whose value is"):
        self_test(other, graph, (1, 3, 40, 40), [images(2, 40)], "noise")
    assert int(quantize_affine(x, model.conv.input_scale, model.conv.input_zero_point).max()) <= 178


@torch.no_grad()
def test_the_command_names_what_is_left_in_float32(tmp_path, monkeypatch, capsys) -> None:
    session, model = converted("{type: inc_int8, targets: [conv1]}", "{type: inc_half, targets: [fc]}", **NETWORK)
    save_packed(model, tmp_path, session.recipe)
    done = Command(monkeypatch, capsys)("export", tmp_path)
    assert done.status == 0, done.err
    assert "computed in int8: conv1\n" in done.out
    assert "left in float32: layer2.0.downsample.1, layer3.0.downsample.1, layer4.0.downsample.1\n" in done.out
    assert "computed in float32 from float16 weights: fc\n" in done.out


@torch.no_grad()
def test_scales_of_the_moment_can_not_be_exported(tmp_path) -> None:
    _, model = converted("{type: inc_dynamic_int8, targets: [fc]}", **NETWORK)
    with pytest.raises(ExportError, match="fc can't be exported to OpenVINO: its input is scaled at run time"):
        export_openvino(model, tmp_path, (1, 3, 32, 32), [images(1, 32)])
