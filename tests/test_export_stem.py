from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("openvino")

from bonn_plugin.export.engine import compile_for_cpu
from bonn_plugin.export.lowering import build_graph
from bonn_plugin.export.openvino import export_openvino, load
from bonn_plugin.export.stem import split_stem


class Net(nn.Module):
    """A stem and what reads it."""

    def __init__(self, filters: int = 32, activation: nn.Module | None = None, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(channels, filters, 7, 2, 3, bias=activation is None)
        self.bn1 = nn.BatchNorm2d(filters)
        self.act1 = activation or nn.PReLU(filters)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for tensor in (self.bn1.weight, self.bn1.bias, self.bn1.running_mean, *self.act1.parameters()):
            nn.init.normal_(tensor)  # factors below 0 too: no two filters alike
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        return y.mean((2, 3))


def kinds(graph: Any) -> Counter[str]:
    return Counter(node.get_type_name() for node in graph.get_ops())


def run(graph: Any, x: Tensor) -> Tensor:
    return torch.from_numpy(compile_for_cpu(graph, 1)(x.numpy())[0].copy())


@pytest.mark.parametrize("activation", [None, nn.PReLU(1), nn.ReLU(), nn.ReLU6()])
@pytest.mark.parametrize("half", [False, True])
def test_a_stem_in_parts_gives_the_same_numbers(activation: nn.Module | None, half: bool) -> None:
    model, x = Net(activation=activation), torch.randn(1, 3, 224, 224)
    graph, whole = (build_graph(model, tuple(x.shape), half=half)[0] for _ in range(2))
    split_stem(graph)
    assert kinds(graph)["Convolution"] == kinds(graph)["MaxPool"] == 2  # 1.6 MB
    torch.testing.assert_close(run(graph, x), run(whole, x), rtol=1e-6, atol=1e-6)
    if not half:
        with torch.no_grad():
            torch.testing.assert_close(run(graph, x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("filters", "channels", "shape", "convolutions"),
    [
        (64, 3, (1, 3, 224, 224), 4),
        (64, 1, (1, 1, 160, 160), 2),
        (64, 3, (1, 3, 112, 112), 1),  # the map fits as it is
        (24, 3, (1, 3, 224, 224), 1),  # no whole vectors in a part
        (32, 3, (8, 3, 224, 224), 1),  # its parts would not fit either
        (64, 8, (1, 8, 224, 224), 1),  # reading the input again is not free
    ],
)
def test_only_a_map_that_does_not_fit_is_split(
    filters: int, channels: int, shape: tuple[int, ...], convolutions: int
) -> None:
    graph, _ = build_graph(Net(filters, channels=channels), shape)
    split_stem(graph)
    assert kinds(graph)["Convolution"] == convolutions


def test_a_stem_that_is_read_before_its_pool_is_left_alone() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.act1(self.bn1(self.conv1(x)))
            return self.maxpool(y).mean((2, 3)) + y.mean((2, 3))

    x = torch.randn(1, 3, 224, 224)
    graph, _ = build_graph(Twice(), tuple(x.shape))
    split_stem(graph)
    assert kinds(graph)["Convolution"] == 1
    with torch.no_grad():
        torch.testing.assert_close(run(graph, x), Twice()(x), rtol=1e-5, atol=1e-5)


def test_an_export_holds_the_parts_and_no_weight_twice(tmp_path: Path) -> None:
    model, x = Net(64), torch.randn(2, 3, 224, 224)
    export_openvino(model, tmp_path, (1, 3, 224, 224), [x])
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path, 1)(x), model(x), rtol=1e-5, atol=1e-5)
    text = (tmp_path / "openvino" / "model.xml").read_text()
    assert text.count('type="Convolution"') == text.count("cpu:jit_avx512") == 4
    numbers = 64 * (3 * 49 + 3)  # weights, two of the norm, slopes
    assert 4 * numbers <= (tmp_path / "openvino" / "model.bin").stat().st_size < 4 * numbers + 500
