from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("openvino")

from bonn_plugin import ModelConfig, Session, parse_recipe, save_packed
from bonn_plugin.errors import ExportError
from bonn_plugin.export.binary import engine_computes
from bonn_plugin.export.cut import Cut
from bonn_plugin.export.engine import compile_for_cpu, import_openvino
from bonn_plugin.export.lowering import build_graph
from bonn_plugin.export.openvino import export_openvino, load, read_info, verify_export
from bonn_plugin.export.selftest import self_test
from bonn_plugin.models import build_model
from bonn_plugin.nn import (
    BinaryConv2d,
    ConvGeometry,
    PackedConv2d,
    RPReLU,
    SignInput,
    SparseConv2d,
    SparseLinear,
    StoredSignConv2d,
    replace_module,
)
from bonn_plugin.recipe import recipe_model

TOLERANCE = 1e-4


def packed(name: str, pattern: str, *, threshold: bool = False, classes: int = 10, seed: int = 0) -> nn.Module:
    """A network with packed convolutions, random weights, and norms that do something."""
    torch.manual_seed(seed)
    model = build_model(name, classes, {}).eval()
    stir(model)
    for layer, conv in list(model.named_modules()):
        if re.fullmatch(pattern, layer):
            assert isinstance(conv, nn.Conv2d)
            binary = BinaryConv2d(conv)
            if threshold:
                binary.add_threshold()
                nn.init.normal_(binary.threshold, 0.2, 0.1)
            replace_module(model, layer, binary.eval().pack())
    return model.eval()


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Norms as after training, a fifth of their factors negative; slopes of their own."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.uniform_(0.5, 1.5).mul_(torch.where(torch.rand_like(module.weight) < 0.2, -1.0, 1.0))
            module.bias.normal_(0, 0.3)
        if isinstance(module, nn.PReLU):
            module.weight.uniform_(-0.1, 0.5)


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    return packed("bonn_resnet18", r"layer\d\.\d\.conv", classes=1000)


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def engine_logits(model: nn.Module, x: Tensor) -> Tensor:
    graph, _ = build_graph(model, tuple(x.shape))
    result = compile_for_cpu(graph, 1)(x.numpy())[0]
    return torch.from_numpy(result.copy())


NETWORKS = {
    "bonn_wrn22_16": (r"layer\d\.\d\.conv\d", False, 32, 18),
    "bonn_resnet18": (r"layer\d\.\d\.conv", False, 64, 16),
    "resnet18": (r"layer\d\.\d\.conv\d", True, 64, 16),
    "resnet50": (r"layer\d\.\d\.conv2", True, 64, 16),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_exported_network_gives_torchs_logits(name: str, tmp_path: Path) -> None:
    pattern, threshold, size, layers = NETWORKS[name]
    model = packed(name, pattern, threshold=threshold)
    x = images(7, 3, size, size)
    info = export_openvino(model, tmp_path, (3, 3, size, size), [x])
    assert list(info.binary_layers.values()) == ["bits"] * layers
    assert info.self_test.samples == 7
    assert info.self_test.agreement == 100
    with torch.no_grad():
        want = model(x)
    got = load(tmp_path)(x)
    assert got.shape == want.shape
    assert (got - want).abs().max() <= TOLERANCE
    assert torch.equal(got.argmax(1), want.argmax(1))


def test_an_export_takes_numpy_and_any_number_of_images(tmp_path: Path) -> None:
    model = packed("bonn_wrn22_16", r"layer\d\.\d\.conv\d")
    export_openvino(model, tmp_path, (4, 3, 16, 16), [images(4, 3, 16, 16)])
    classify = load(tmp_path, threads=1)
    x = images(9, 3, 16, 16)
    logits = classify(x.numpy())
    assert isinstance(logits, np.ndarray)
    assert logits.shape == (9, 10)
    one_by_one = np.concatenate([classify(image[None].numpy()) for image in x])
    np.testing.assert_allclose(logits, one_by_one, atol=1e-5)
    assert classify(x[:0]).shape == (0, 10)
    with pytest.raises(ExportError, match=r"takes images of shape \(N, 3, 16, 16\), not \(1, 3, 32, 32\)"):
        classify(images(1, 3, 32, 32))


def test_resnet18_takes_one_bit_a_weight_on_disk(resnet18: nn.Module, tmp_path: Path) -> None:
    samples = [images(2, 3, 32, 32)]
    export_openvino(resnet18, tmp_path / "full", (1, 3, 32, 32), samples)
    assert (tmp_path / "full/openvino/model.bin").stat().st_size <= 4_300_000
    info = export_openvino(resnet18, tmp_path / "half", (1, 3, 32, 32), samples, half=True)
    assert (tmp_path / "half/openvino/model.bin").stat().st_size <= 2_900_000
    assert read_info(tmp_path / "half") == info
    found = verify_export(resnet18, tmp_path / "half", [images(3, 3, 32, 32, seed=2)])
    assert found.difference <= TOLERANCE


class Layered(nn.Module):
    """norm -> 1-bit convolution -> PReLU, with an optional bias."""

    def __init__(self, layer: PackedConv2d) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(layer.geometry.in_channels)
        self.conv = layer
        self.act = nn.PReLU(layer.geometry.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.conv(self.norm(x)))
        return y


CHANNELS = st.sampled_from([3, 12, 20, 100])


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    channels=CHANNELS,
    filters=CHANNELS,
    kernel=st.tuples(st.sampled_from([1, 3, 5, 7]), st.sampled_from([1, 3, 5, 7])),
    stride=st.sampled_from([1, 2, 3]),
    padding=st.integers(0, 3),
    dilation=st.sampled_from([1, 1, 2]),
    grouped=st.sampled_from([False, False, True]),
    size=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    threshold=st.booleans(),
    bias=st.booleans(),
    scale=st.sampled_from([0.05, -0.3]),
    merged=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_packed_convolution_gives_torchs_sums(
    channels: int,
    filters: int,
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    dilation: int,
    grouped: bool,
    size: tuple[int, int],
    threshold: bool,
    bias: bool,
    scale: float,
    merged: bool,
    seed: int,
) -> None:
    assume(all(s + 2 * padding > dilation * (k - 1) for s, k in zip(size, kernel, strict=True)))
    torch.manual_seed(seed)
    groups = channels if grouped and filters % channels == 0 else 1
    pairs = [(n, n) for n in (stride, padding, dilation)]
    geometry = ConvGeometry(channels, filters, kernel, *pairs, groups)
    layer = PackedConv2d.from_dense(
        geometry,
        merged_weight(*geometry.weight_shape, seed=seed) if merged else torch.randn(geometry.weight_shape),
        torch.tensor(scale),
        torch.randn(channels) * 0.3 if threshold else None,
        torch.randn(filters) if bias else None,
    )
    model = Layered(layer).eval()
    stir(model)
    x = torch.randn(2, channels, *size)
    with torch.no_grad():
        want = model(x)
        values = model.norm(x) - (0 if layer.threshold is None else layer.threshold[:, None, None])
    assume(values.abs().min() > 1e-5)  # no value so near its threshold that rounding decides
    got = engine_logits(model, x)
    assert (got - want).abs().max() <= TOLERANCE


@pytest.mark.parametrize("threshold", [False, True])
@pytest.mark.parametrize("channels", [3, 16])
def test_a_value_equal_to_its_threshold_is_positive(channels: int, threshold: bool) -> None:
    geometry = ConvGeometry(channels, 8, (1, 1), (1, 1), (0, 0), (1, 1), 1)
    at = torch.tensor([0.0, 0.7, -0.3, 1e-30, -1e-30, 5e4, -5e4, 1.0]).repeat(2)[:channels] if threshold else None
    layer = PackedConv2d.from_dense(geometry, torch.randn(8, channels, 1, 1), torch.tensor(1.0), at, None)
    edge = torch.zeros(channels) if at is None else at
    tiny = torch.finfo(torch.float32).tiny
    below = torch.nextafter(edge, torch.tensor(-torch.inf))
    below = torch.where(below.abs() < tiny, torch.tensor(-tiny), below)
    x = torch.stack([edge, below, torch.nextafter(edge, torch.tensor(torch.inf))], -1)[None, :, :, None]
    model = nn.Sequential(layer)
    assert torch.equal(engine_logits(model, x)[:, :, :2], model(x)[:, :, :2])
    expected = F.conv2d(torch.ones(1, channels, 1, 1), layer.dense_weight())
    assert torch.equal(engine_logits(model, x)[:, :, :1], expected)


def test_a_cut_lies_just_below_the_threshold() -> None:
    tiny = torch.finfo(torch.float32).tiny
    t = torch.tensor([1.0, -1.0, 0.0, tiny])
    below = Cut.at(t).above
    assert bool((below < t).all())
    assert bool((torch.nextafter(below[:2], t[:2]) == t[:2]).all())
    assert below[2:].tolist() == [-tiny, 0.0]


def test_a_cut_through_a_norm_decides_as_torch_does_to_the_last_bit() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(400).eval()
    stir(norm)
    with torch.no_grad():
        norm.weight[:3] = 0
        norm.bias[:3] = torch.tensor([1.0, -1.0, 0.0])
        norm.bias[3:8] = 0
        norm.running_mean[3:8] = 0
        t = torch.randn(400) * 0.2
        t[:20] = 0
        cut = Cut.through(norm, t)
        edge = cut.above.where(cut.above.abs() > 1e-30, torch.zeros(()))
        x = [edge]
        for direction in (-torch.inf, torch.inf):
            step = edge
            for _ in range(8):
                step = torch.nextafter(step, torch.tensor(direction))
                x.append(torch.where(step.abs() < 1e-30, 1e-30 * torch.sign(torch.tensor(direction)), step))
        x = [v.clamp(-1e30, 1e30) for v in [*x, edge + 1, edge - 1]]
        for v in x:
            wide = v[None, :, None, None].expand(1, 400, 4, 16).contiguous()
            want = ((norm(wide) - t[:, None, None]) >= 0)[0, :, 0, 0]
            assert torch.equal((v > cut.above) != cut.falling, want)


def test_a_norm_before_a_sign_costs_no_bit_of_exactness() -> None:
    torch.manual_seed(0)
    geometry = ConvGeometry(16, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    layer = PackedConv2d.from_dense(geometry, torch.randn(16, 16, 3, 3), torch.tensor(1.0), None, None)
    model = nn.Sequential(nn.BatchNorm2d(16), layer).eval()
    stir(model)
    with torch.no_grad():
        at = Cut.through(model[0], torch.zeros(16)).above
        x = at[None, :, None, None].repeat(2, 1, 16, 16)
        for _ in range(3):  # a few floats on either side of the change of sign
            x = torch.nextafter(x, torch.where(torch.rand_like(x) < 0.5, -torch.inf, torch.inf))
        want = model(x)
    assert torch.equal(engine_logits(model, x), want)


def test_a_padded_position_is_zero() -> None:
    geometry = ConvGeometry(8, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    layer = PackedConv2d.from_dense(geometry, torch.ones(8, 8, 3, 3), torch.tensor(1.0), None, None)
    sums = engine_logits(nn.Sequential(layer), torch.ones(1, 8, 3, 3))
    assert sums[0, 0].tolist() == [[32, 48, 32], [48, 72, 48], [32, 48, 32]]


def test_what_the_engine_computes_wrongly_is_computed_another_way() -> None:
    geometry = ConvGeometry(16, 16, (5, 5), (3, 3), (1, 1), (1, 1), 1)
    assert not engine_computes(geometry, 16, (33, 17))
    layer = PackedConv2d.from_dense(geometry, images(16, 16, 5, 5), torch.tensor(0.5), None, None)
    model = nn.Sequential(layer)
    x = images(1, 16, 33, 17)
    graph, paths = build_graph(model, tuple(x.shape))
    assert paths == {"0": "float32"}
    assert torch.equal(torch.from_numpy(compile_for_cpu(graph, 1)(x.numpy())[0]), model(x))
    kinds = {op.get_element_type().get_type_name() for op in graph.get_ops() if op.get_type_name() == "Constant"}
    assert "u1" in kinds  # one bit a weight on disk all the same


def merged_weight(filters: int, *rest: int, seed: int = 0) -> Tensor:
    """Filters of which several are equal and several opposite."""
    generator = torch.Generator().manual_seed(seed)
    unique = torch.randn(max(1, filters // 3), *rest, generator=generator)
    rows = torch.randint(0, len(unique), (filters,), generator=generator)
    signs = torch.randint(0, 2, (filters,), generator=generator) * 2 - 1
    return unique[rows] * signs[:, None, None, None]


@pytest.mark.parametrize("kept", [None, torch.arange(12) % 4 != 1])
def test_merged_filters_are_computed_once_and_gathered(kept: Tensor | None) -> None:
    geometry = ConvGeometry(20, 12, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    bias = images(12)
    layer = PackedConv2d.from_dense(geometry, merged_weight(12, 20, 3, 3), torch.tensor(0.25), None, bias, kept)
    assert layer.weight_index is not None
    assert layer.weight_sign is not None
    x = images(2, 20, 6, 6)
    graph, paths = build_graph(nn.Sequential(layer), tuple(x.shape))
    assert paths == {"0": "bits"}
    [convolution] = [op for op in graph.get_ops() if op.get_type_name() == "BinaryConvolution"]
    assert list(convolution.output(0).shape)[1] == layer.unique_filters < 12
    got = torch.from_numpy(compile_for_cpu(graph, 1)(x.numpy())[0])
    torch.testing.assert_close(got, layer(x), rtol=0, atol=1e-6)


class Everything(nn.Module):
    """The operations of common backbones, as modules and as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(6, 12, 3, 2, 1, groups=3)
        self.depthwise = nn.Conv2d(12, 12, 3, padding="same", dilation=2, groups=12, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.acts = nn.ModuleList(
            [nn.ReLU6(), nn.Hardswish(), nn.SiLU(), nn.GELU(), nn.Sigmoid(), nn.PReLU(), nn.LeakyReLU(0.2), nn.ELU()]
        )
        self.max = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        self.avg = nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=True)
        self.avg_without = nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)
        self.drop = nn.Dropout(0.5)
        self.to_two = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.depthwise(self.grouped(x)))
        for act in self.acts:
            x = act(x) * 1.5 + 0.25
        x = torch.cat([self.max(x), self.avg(x), self.avg_without(x)], 1)
        x = F.relu(x - 0.1, inplace=True)
        x = x + F.hardsigmoid(x) * torch.sigmoid(x).mean((2, 3), keepdim=True)
        x = F.max_pool2d(self.to_two(x), 2) if x is not None else x
        x = F.adaptive_avg_pool2d(x, 1)
        return self.fc(self.drop(x.view(x.size(0), -1)) / 2)


@pytest.mark.parametrize("size", [(13, 16), (15, 9)])
def test_operations_of_common_backbones(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = Everything().eval()
    stir(model)
    x = images(2, 6, *size)
    with torch.no_grad():
        want = model(x)
    assert (engine_logits(model, x) - want).abs().max() <= 1e-5


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_average_pooling_at_every_edge(ceil_mode: bool, include: bool) -> None:
    for size in (4, 5, 6, 7):
        for kernel, stride, padding in ((2, 2, 0), (3, 2, 1), (3, 3, 1), (2, 3, 1), (4, 2, 2)):
            pool = nn.AvgPool2d(kernel, stride, padding, ceil_mode=ceil_mode, count_include_pad=include)
            x = images(1, 8, size, size)
            torch.testing.assert_close(engine_logits(nn.Sequential(pool), x), pool(x), msg=f"{pool}, {size}")
            largest = nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil_mode)
            torch.testing.assert_close(engine_logits(nn.Sequential(largest), x), largest(x), msg=f"{largest}, {size}")


class _Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y


class _Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x).real


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Decides()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


class _Decides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


REFUSED = {
    "a module": (_Norm(), r"body\.1 can't be exported to OpenVINO: there is no lowering for GroupNorm"),
    "a function": (_Fourier(), r"fft\w* can't be exported to OpenVINO: there is no lowering for the function"),
    "control flow": (_Branching(), r"inner can't be exported to OpenVINO: its forward pass can't be traced"),
    "a padding": (
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")),
        r"0 can't be exported to OpenVINO: padding mode 'reflect'",
    ),
    "a batch norm": (nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), r"depends on the batch"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cant_be_expressed_is_named_and_leaves_no_file(what: str, tmp_path: Path) -> None:
    model, message = REFUSED[what]
    with pytest.raises(ExportError, match=message) as caught:
        export_openvino(model.eval(), tmp_path, (1, 3, 8, 8), [images(1, 3, 8, 8)])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def sign_at(threshold: float) -> nn.Module:
    geometry = ConvGeometry(8, 8, (1, 1), (1, 1), (0, 0), (1, 1), 1)
    weight = images(8, 8, 1, 1, seed=3)
    return nn.Sequential(
        PackedConv2d.from_dense(geometry, weight, torch.tensor(1.0), torch.full((8,), threshold), None), nn.Flatten()
    )


def test_wrong_logits_are_an_error() -> None:
    x = images(2, 8, 3, 3)
    graph, _ = build_graph(sign_at(0.4), tuple(x.shape))
    with pytest.raises(ExportError, match=r"differ from torch's by .* signs or integers differ whose value is"):
        self_test(sign_at(0.0), graph, (2, 8, 3, 3), [x], "noise")
    real = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))
    graph, _ = build_graph(real, tuple(x.shape))
    with torch.no_grad():
        real[1].bias += 1e-3
    with pytest.raises(ExportError, match="no sign on which rounding could decide"):
        self_test(real, graph, (2, 8, 3, 3), [x], "noise")
    with pytest.raises(ExportError, match="no samples"):
        self_test(real, graph, (2, 8, 3, 3), [], "noise")


def test_a_sign_that_rounding_decides_is_proven_to_be_one() -> None:
    x = images(3, 8, 3, 3)
    x[1, 2, 1, 1] = 0.5
    graph, _ = build_graph(sign_at(float(np.nextafter(np.float32(0.5), np.float32(1)))), (2, 8, 3, 3))
    found = self_test(sign_at(0.5), graph, (2, 8, 3, 3), [x], "noise")
    assert (found.tied_samples, found.tied_signs) == (1, 1)
    assert found.tied_difference == 2
    assert found.difference <= TOLERANCE
    assert "1 signs" in str(found) or "1 sign" in str(found)


def test_a_failed_self_test_leaves_the_old_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(2, 8, 3, 3)
    export_openvino(sign_at(0.0), tmp_path, (2, 8, 3, 3), [x])
    before = {p.name: p.read_bytes() for p in (tmp_path / "openvino").iterdir()}
    other, _ = build_graph(sign_at(0.4), (2, 8, 3, 3))
    monkeypatch.setattr("bonn_plugin.export.openvino.build_graph", lambda *_, **__: (other, {}))
    with pytest.raises(ExportError, match="differ"):
        export_openvino(sign_at(0.0), tmp_path, (2, 8, 3, 3), [x])
    assert {p.name: p.read_bytes() for p in (tmp_path / "openvino").iterdir()} == before


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    export_openvino(sign_at(0.0), tmp_path, (1, 8, 3, 3), [images(1, 8, 3, 3)])
    return tmp_path


@pytest.mark.parametrize("name", ["model.xml", "model.bin", "export.json"])
@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_a_damaged_export_is_not_loaded(exported: Path, name: str, how: str) -> None:
    place = exported / "openvino" / name
    content = place.read_bytes()
    if how == "gone":
        place.unlink()
    else:
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        place.write_bytes(content[:-7] if how == "cut" else changed)
    with pytest.raises(ExportError, match=re.escape(name)) as caught:
        load(exported)
    assert "\n" not in str(caught.value)


def test_an_export_of_another_checkpoint_is_found_out(exported: Path) -> None:
    with pytest.raises(ExportError, match="if the checkpoint is newer, export it again"):
        verify_export(sign_at(0.6), exported, [images(1, 8, 3, 3)])


def test_a_missing_openvino_says_what_to_install(monkeypatch: pytest.MonkeyPatch, exported: Path) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ExportError, match=r"pip install 'bonn_plugin\[openvino\]'"):
        import_openvino()
    with pytest.raises(ExportError, match=r"pip install 'bonn_plugin\[openvino\]'"):
        load(exported)


def test_the_package_does_not_import_openvino_before_it_is_used() -> None:
    program = "import sys, bonn_plugin.export.bench_report; assert 'openvino' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the digits recipe, untrained."""
    from bonn_plugin.recipe import load_recipe

    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "digits_wrn22_16.yaml")
    folder = tmp_path_factory.mktemp("checkpoint")
    save_packed(packed("bonn_wrn22_16", r"layer\d\.\d\.conv\d"), folder, recipe)
    return folder


def bonn(*arguments: object, code: int = 0, capsys: pytest.CaptureFixture[str]) -> str:
    from bonn_plugin.cli import main

    old = sys.argv
    sys.argv = ["bonn", *map(str, arguments)]
    try:
        main()
        found = 0
    except SystemExit as end:
        found = int(end.code or 0)
    finally:
        sys.argv = old
    out, err = capsys.readouterr()
    assert found == code, out + err
    return out if code == 0 else err


def test_the_command_exports_verifies_and_evaluates(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = bonn("export", checkpoint, "--to", "openvino", "--batch", 50, "--samples", 450, capsys=capsys)
    assert "18 of 18 binary convolutions computed with bits" in out
    assert "top-1 equal on 100 % of 450 samples (test set of digits)" in out
    assert "verified" in (out := bonn("verify", checkpoint, capsys=capsys))
    assert "/openvino: checksums right, logits within" in out
    by_torch = bonn("evaluate", checkpoint, capsys=capsys)
    by_engine = bonn("evaluate", checkpoint, "--engine", "openvino", capsys=capsys)
    assert by_torch.split("top-1")[1] == by_engine.split("top-1")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "DIR", "--to", "onnx"], "unknown engine 'onnx'"),
        (["export", "DIR", "--size", "224"], "--size '224' is not HxW"),
        (["evaluate", "DIR", "--engine", "tpu"], "unknown engine 'tpu'"),
        (["export", "/nowhere"], "/nowhere: no such folder"),
    ],
)
def test_a_mistake_prints_one_line(
    arguments: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    err = bonn(*(checkpoint if a == "DIR" else a for a in arguments), code=2, capsys=capsys)
    assert message in err
    assert err.count("\n") == 1


def test_bench_measures_every_engine(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nncf")
    options = ["--seconds", 0.01, "--no-torch-compile", "--no-memory", "--batch", 2, "--out", tmp_path]
    out = bonn("bench", checkpoint, *options, capsys=capsys)
    assert "OpenVINO 1-bit" in out
    found = json.loads((tmp_path / "bench.json").read_text())
    engines = {row["engine"] for row in found["speeds"]}
    assert engines == {"torch eager fp32", "OpenVINO fp32", "OpenVINO int8", "OpenVINO 1-bit"}
    assert len(found["layers"]) == 18
    assert all(row["bits_ms"] >= 0 and row["float_ms"] > 0 for row in found["layers"])
    assert any("20 of 20" in note or "21 of 21" in note for note in found["notes"])
    assert found["files"]["OpenVINO 1-bit, .bin"] * 10 < found["files"]["OpenVINO fp32, .bin"]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "bench.md").read_text().startswith("# Speed")


def test_peak_memory_is_that_of_the_engine_alone(exported: Path) -> None:
    from bonn_plugin.export.memory import openvino_memory

    found = openvino_memory(exported / "openvino" / "model.xml")
    if sys.platform == "linux":
        assert found is not None
        assert 10e6 < found[0] <= found[1] < 1e9


def test_a_checkpoint_without_a_recipe_is_tested_on_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = packed("bonn_wrn22_16", r"layer\d\.\d\.conv\d")
    save_packed(model, tmp_path, ModelConfig(name="bonn_wrn22_16", num_classes=10))
    out = bonn("export", tmp_path, "--size", "20x24", capsys=capsys)
    assert "input 1 x 3 x 20 x 24" in out
    assert "noise: no recipe in the checkpoint" in out


def test_two_engines_that_go_in_turn_leave_a_process_that_takes_signals() -> None:
    program = """
import gc, signal, numpy as np, openvino as ov, openvino.opset14 as ops
from bonn_plugin.export.engine import compile_for_cpu
def engine():
    x = ops.parameter([1, 3], np.float32)
    return compile_for_cpu(ov.Model([ops.relu(x)], [x]), 1)
first, second = engine(), engine()
del first; gc.collect()
del second; gc.collect()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("taken")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "taken\n")


@pytest.mark.parametrize("weights", ["binary", "real"])
def test_reactnets_parts_and_sparse_layers_are_exported(weights: str, tmp_path: Path) -> None:
    text = f"""version: 1
name: parts
model: {{name: bonn_resnet18, num_classes: 10, args: {{widths: [8, 16, 16, 24]}}}}
data: {{name: digits, size: 64}}
training: {{epochs: 1, batch_size: 8, optimizer: {{name: adam, lr: 1e-3}}}}
modifiers:
  - {{type: binarize, weights: {weights}, activation: rprelu, threshold: always}}
  - {{type: magnitude_prune, sparsity: 0.6}}
"""
    torch.manual_seed(0)
    recipe = parse_recipe(text)
    session = Session(recipe, 1)
    session.prepare(recipe_model(recipe))
    stir(session.model)
    for module in session.model.modules():
        if isinstance(module, RPReLU):
            for parameter in module.parameters():
                nn.init.uniform_(parameter, -0.3, 0.5)
        if isinstance(module, SignInput):
            assert module.threshold is not None
            nn.init.normal_(module.threshold, 0.1, 0.2)
    for modifier in session.modifiers:
        modifier.foresee()
    model = session.convert()
    kinds = {type(m) for m in model.modules()}
    assert {RPReLU, SparseConv2d, SparseLinear} <= kinds
    assert (StoredSignConv2d if weights == "real" else PackedConv2d) in kinds
    x = images(5, 3, 64, 64)
    info = export_openvino(model, tmp_path, (1, 3, 64, 64), [x])
    assert info.self_test.agreement == 100
    with torch.no_grad():
        assert (load(tmp_path)(x) - model(x)).abs().max() <= 5 * TOLERANCE
