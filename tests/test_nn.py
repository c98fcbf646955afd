"""The layers: training and packed compute the same bits, and learn what they should."""

import pytest
import torch
from torch import nn

from bonn_plugin.nn import BimodalPrior, BinaryConv2d, ConvGeometry, PackedConv2d, Role, stored_tensors
from bonn_plugin.nn.binary_conv import THRESHOLD_BATCHES
from bonn_plugin.nn.features import FeatureClusters
from bonn_plugin.nn.operations import count_macs
from tests import reference

SHAPES = [
    # in, out, kernel, stride, padding, dilation, groups, bias, threshold
    (3, 5, 3, 1, 1, 1, 1, False, False),
    (8, 6, 3, 2, 1, 1, 2, True, True),
    (4, 4, 1, 1, 0, 1, 1, True, False),
    (5, 3, 5, 1, 3, 2, 1, False, True),
    (6, 6, 3, 1, 1, 1, 6, False, False),
]


def make(shape, seed=0):
    torch.manual_seed(seed)
    i, o, kernel, stride, padding, dilation, groups, bias, threshold = shape
    conv = nn.Conv2d(i, o, kernel, stride, padding, dilation, groups, bias)
    layer = BinaryConv2d(conv, threshold=threshold)
    with torch.no_grad():
        layer.modulation.uniform_(-0.1, 0.5)
        if threshold:
            layer.threshold.normal_()
    return layer.eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_training_and_packed_layer_give_the_same_bits_and_what_the_loops_give(shape):
    layer = make(shape)
    x = torch.randn(2, shape[0], 7, 6)
    packed = layer.pack().eval()
    y = layer(x)
    assert torch.equal(y, packed(x))
    t = 0 if layer.threshold is None else layer.threshold.detach()[:, None, None]
    a = torch.where(x - t >= 0, 1.0, -1.0)
    signs = torch.where(layer.weight.detach() >= 0, 1.0, -1.0)
    wanted = reference.convolve(a, signs, *shape[3:7]) * float(layer.modulation.detach().mean())
    if layer.bias is not None:
        wanted = wanted + layer.bias.detach().double()[:, None, None]
    assert torch.allclose(y.double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_padded_position_is_zero():
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    nn.init.constant_(conv.weight, 0.5)
    layer = BinaryConv2d(conv)
    y = layer(torch.full((1, 1, 3, 3), 2.0)) / 0.5
    assert y[0, 0].tolist() == [[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]


def test_the_layer_takes_over_the_convolutions_own_parameters():
    conv = nn.Conv2d(4, 4, 3, bias=True)
    layer = BinaryConv2d(conv)
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias
    assert float(layer.modulation.detach().mean()) == pytest.approx(float(conv.weight.detach().abs().mean()))
    assert not isinstance(layer, nn.Conv2d)


def test_convolutions_that_are_not_zero_padded_on_both_sides_are_refused():
    with pytest.raises(ValueError, match="padding mode"):
        BinaryConv2d(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"))
    with pytest.raises(ValueError, match="more than the other"):
        BinaryConv2d(nn.Conv2d(2, 2, 4, padding="same"))
    layer = BinaryConv2d(nn.Conv2d(2, 2, 5, padding="same"))
    assert layer.geometry.padding == (2, 2)


def test_the_threshold_starts_at_the_mean_of_the_first_batches_and_then_learns():
    conv = nn.Conv2d(2, 3, 3)
    layer = BinaryConv2d(conv, threshold=True).train()
    assert layer.awaits_threshold
    batches = [torch.rand(4, 2, 5, 5) + torch.tensor([0.0, 3.0])[:, None, None] for _ in range(THRESHOLD_BATCHES)]
    for batch in batches:
        layer(batch)
    wanted = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
    assert torch.allclose(layer.threshold.detach(), wanted, atol=1e-5)
    before = layer.threshold.detach().clone()
    layer(torch.rand(4, 2, 5, 5) + 9).sum().backward()
    assert torch.equal(layer.threshold.detach(), before)
    assert not layer.awaits_threshold


def test_a_loaded_threshold_is_not_set_again():
    layer = BinaryConv2d(nn.Conv2d(2, 3, 3), threshold=True).train()
    for _ in range(3):
        layer(torch.rand(2, 2, 5, 5))
    other = BinaryConv2d(nn.Conv2d(2, 3, 3), threshold=True).train()
    other.load_state_dict(layer.state_dict())
    batch = torch.rand(2, 2, 5, 5)
    for _ in range(THRESHOLD_BATCHES):
        layer(batch)
        other(batch)
    assert torch.equal(layer.threshold.detach(), other.threshold.detach())


def test_the_gradient_of_the_threshold_is_minus_that_of_the_input():
    layer = make((3, 4, 3, 1, 1, 1, 1, False, True))
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    layer(x).square().sum().backward()
    assert torch.allclose(layer.threshold.grad, -x.grad.sum((0, 2, 3)), atol=1e-4)


def test_binary_weights_survive_a_reduced_precision_convolution():
    layer = make((8, 8, 3, 1, 1, 1, 1, False, False))
    x = torch.randn(2, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    # sums of 72 signs are exact in bfloat16, whose one rounding comes with the scale
    assert torch.allclose(low.float(), layer(x), rtol=2**-8)


def test_the_prior_starts_at_mean_and_spread_of_each_filters_magnitude():
    weight = torch.randn(4, 3, 3, 3)
    prior = BimodalPrior(weight, 1e-4)
    magnitude = weight.abs().flatten(1)
    assert torch.allclose(prior.mu.detach(), magnitude.mean(1))
    assert torch.allclose(prior.sigma.detach(), magnitude.std(1, unbiased=False), rtol=1e-5)
    with torch.no_grad():
        prior.log_sigma.fill_(-50.0)
    assert bool((prior.sigma == 1e-4).all())


def test_the_prior_is_estimated_again_once_when_its_loss_begins():
    prior = BimodalPrior(torch.ones(2, 3), 1e-4)
    prior.start(torch.full((2, 3), 5.0))
    assert prior.mu.tolist() == [5.0, 5.0]
    prior.start(torch.zeros(2, 3))
    assert prior.mu.tolist() == [5.0, 5.0]


def test_clusters_gather_the_exact_means_and_spreads_over_batches():
    torch.manual_seed(0)
    features, labels = torch.randn(50, 4) * 3 + 1, torch.randint(0, 3, (50,))
    clusters = FeatureClusters(4, 4)
    for chunk in torch.arange(50).split(7):
        clusters.gather(features[chunk], labels[chunk])
    clusters.start()
    for m in range(3):
        own = features[labels == m]
        assert torch.allclose(clusters.centers[m], own.mean(0), atol=1e-5)
        assert torch.allclose(clusters.sigma[m].detach(), own.std(0, unbiased=False), rtol=1e-4)
    assert torch.allclose(clusters.centers[3], clusters.mean[:3].mean(0), atol=1e-5)


def test_what_a_packed_layer_stores():
    packed = make((8, 6, 3, 2, 1, 1, 2, True, True)).pack()
    stored = dict(stored_tensors(packed))
    assert stored["weight_packed"].tensor.shape == (6, 5)  # 4 * 9 = 36 bits a filter
    assert stored["weight_packed"].role is Role.BINARY_WEIGHT
    assert stored["weight_packed"].needed_bits == 6 * 36
    assert stored["weight_packed"].original_elements == 6 * 36
    assert stored["weight_scale"].original_elements == stored["threshold"].original_elements == 0
    assert stored["bias"].original_elements == 6
    rebuilt = PackedConv2d.from_spec(packed.spec())
    assert {n: s.tensor.shape for n, s in stored_tensors(rebuilt)} == {n: s.tensor.shape for n, s in stored.items()}


@pytest.mark.parametrize(
    "change", [{"groups": 3}, {"stride": [0, 1]}, {"kernel_size": 3}, {"in_channels": "x"}, {"padding": [-1, 0]}]
)
def test_a_geometry_that_makes_no_sense_is_refused(change):
    spec = ConvGeometry.of(nn.Conv2d(4, 4, 3)).to_dict()
    assert ConvGeometry.from_dict(spec) == ConvGeometry.of(nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match=r"not the geometry|invalid literal"):
        ConvGeometry.from_dict({**spec, **change})


def test_multiply_accumulates_are_counted_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), make((8, 4, 3, 1, 1, 1, 2, False, False)).pack())
    macs = count_macs(model, torch.zeros(1, 3, 8, 8))
    assert macs["0"].real == 8 * 16 * 27
    assert macs["2"].binary == 4 * 16 * 36
    assert macs["0"].ops + macs["2"].ops == 8 * 16 * 27 + 4 * 16 * 36 / 64


def test_the_packed_convolution_can_be_exported_as_a_graph():
    model = nn.Sequential(make((3, 5, 3, 1, 1, 1, 1, False, False)).pack()).eval()
    x = torch.randn(1, 3, 6, 6)
    program = torch.export.export(model, (x,))
    assert any("bonn.binary_conv2d" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x), model(x))
