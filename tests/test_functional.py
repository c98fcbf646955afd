"""The method against its equations, written out in loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bonn_plugin.functional import (
    binarize_activation,
    binarize_weight,
    convolve_signs,
    feature_loss,
    keep_positive_,
    kernel_loss,
    pack_signs,
    scale_backward,
    scale_forward,
    sign,
    sign_weight,
    unpack_signs,
    update_centers,
)
from tests import reference


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(5, 4, 3, 3, generator=generator, dtype=torch.float64) * 2
    weight[0, 0, 0, 0] = 0.0
    modulation = torch.rand(4, 3, 3, generator=generator, dtype=torch.float64) + 0.2
    mu = torch.rand(5, generator=generator, dtype=torch.float64) + 0.5
    sigma = torch.rand(5, generator=generator, dtype=torch.float64) + 0.3
    return [t.requires_grad_() for t in (weight, modulation, mu, sigma)]


def test_the_sign_of_zero_is_plus_one_for_weights_and_activations():
    zeros = torch.tensor([0.0, -0.0])
    assert sign(zeros).tolist() == [1.0, 1.0]
    assert binarize_activation(zeros).tolist() == [1.0, 1.0]
    assert binarize_weight(torch.zeros(1, 2), torch.ones(2)).tolist() == [[1.0, 1.0]]
    assert unpack_signs(pack_signs(zeros[None]), (1, 2)).tolist() == [[1.0, 1.0]]


def test_binarized_weight_is_the_mean_modulation_times_the_sign(layer):
    weight, modulation, *_ = layer
    expected = torch.full_like(weight, float(modulation.detach().mean()))
    expected[weight < 0] *= -1
    assert torch.equal(binarize_weight(weight, modulation), expected)


def test_gradients_of_binarize_weight_are_equations_12_and_15(layer):
    weight, modulation, *_ = layer
    grad = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    binarize_weight(weight, modulation).backward(grad)
    grad_x, grad_w = reference.eq12_and_15(weight.detach(), modulation.detach(), grad)
    assert bool((grad_x == 0).any()), "the mask of Eq. 12 must matter in this test"
    assert relative(weight.grad, grad_x) < 1e-10
    assert relative(modulation.grad, grad_w) < 1e-10


def test_an_element_of_w_below_zero_turns_the_gradient_round_and_none_stays_there():
    generator = torch.Generator().manual_seed(2)
    weight = (0.1 * torch.randn(6, 4, 3, 3, dtype=torch.float64, generator=generator)).requires_grad_()
    modulation = torch.randn(4, 3, 3, dtype=torch.float64, generator=generator) + 0.5
    assert modulation.mean() > 0, "X̂ must rise with X"
    grad = torch.randn(weight.shape, dtype=torch.float64, generator=generator)  # dL/dX̂

    def turned(w):
        weight.grad = None
        binarize_weight(weight, w).backward(grad)
        return weight.grad * grad < 0

    below = modulation < 0
    assert bool(below.any())
    assert torch.equal(turned(modulation), below.expand(weight.shape))
    kept = modulation.clone()
    keep_positive_(kept)
    assert not bool(turned(kept).any())
    positive = [v for v in modulation.flatten().tolist() if v > 0]
    floor = 0.01 * sum(positive) / modulation.numel()
    for before, after in zip(modulation.flatten().tolist(), kept.flatten().tolist(), strict=True):
        assert after == pytest.approx(max(before, floor), rel=1e-12)


def test_w_is_positive_even_where_all_of_it_was_below_zero_and_what_is_above_the_floor_stays_as_it_is():
    none = torch.full((2, 3, 3), -0.5)
    keep_positive_(none)
    assert none.tolist() == torch.full((2, 3, 3), 0.005).tolist()
    w = torch.rand(4, 3, 3) + 0.2
    before = w.clone()
    keep_positive_(w)
    assert torch.equal(w, before)
    for bad in ("nan", "inf", "-inf"):
        broken = torch.tensor([1.0, float(bad), -1.0])
        keep_positive_(broken)
        assert bool(torch.isnan(broken).all()), "what diverged must be seen"


def test_scaling_after_the_convolution_keeps_the_gradients_of_equation_12(layer):
    weight, modulation, *_ = layer
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64).requires_grad_()
    outer = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    direct = torch.nn.functional.conv2d(binarize_activation(x), binarize_weight(weight, modulation))
    direct.backward(outer)
    wanted = [t.grad.clone() for t in (x, weight, modulation)]
    for t in (x, weight, modulation):
        t.grad = None
    scale = modulation.detach().mean()
    a = scale_backward(binarize_activation(x), scale)
    scaled = scale_forward(torch.nn.functional.conv2d(a, sign_weight(weight, modulation)), scale)
    scaled.backward(outer)
    assert torch.allclose(direct, scaled, rtol=1e-12)
    for t, w in zip((x, weight, modulation), wanted, strict=True):
        assert relative(t.grad, w) < 1e-10


@pytest.mark.parametrize(
    ("ste", "bound", "derivative"),
    [
        ("clip", 1.0, lambda x: 1.0 if abs(x) <= 1 else 0.0),
        ("clip", 1.5, lambda x: 1.0 if abs(x) <= 1.5 else 0.0),
        ("polynomial", 1.0, lambda x: (2 + 2 * x if x < 0 else 2 - 2 * x) if abs(x) <= 1 else 0.0),
    ],
)
def test_gradient_of_the_activation(ste, bound, derivative):
    x = torch.tensor([-2.0, -1.5, -1.0, -0.3, 0.0, 0.4, 1.0, 1.2, 3.0], dtype=torch.float64, requires_grad=True)
    y = binarize_activation(x, ste, bound)
    y.backward(torch.arange(1.0, 10.0, dtype=torch.float64))
    assert y.tolist() == [reference.sgn(v) for v in x.tolist()]
    assert x.grad.tolist() == pytest.approx([(i + 1) * derivative(v) for i, v in enumerate(x.tolist())])


def test_wrong_arguments_of_the_binarisers_are_refused(layer):
    weight, *_ = layer
    with pytest.raises(ValueError, match="same"):
        binarize_weight(weight, torch.ones(2, 2))
    with pytest.raises(ValueError, match="positive"):
        binarize_activation(weight, "clip", 0)
    with pytest.raises(ValueError, match="unknown ste"):
        binarize_activation(weight, "tanh")
    with pytest.raises(ValueError, match="fixed bound"):
        binarize_activation(weight, "polynomial", 2.0)


def test_kernel_loss_is_equation_9_and_its_gradients_equations_13_and_16_to_18(layer):
    nu = 0.37
    loss = kernel_loss(*layer, nu)
    (loss * 1.7).backward()
    plain = [t.detach() for t in layer]
    assert float(loss.detach()) == pytest.approx(reference.eq9_kernel(*plain, nu), rel=1e-12)
    for tensor, wanted in zip(layer, reference.eq13_and_16_to_18(*plain, nu), strict=True):
        assert relative(tensor.grad, 1.7 * wanted) < 1e-10


def test_the_kernel_loss_depends_on_no_sign(layer):
    """What docs/results.md says of it: of two kernels with equal magnitudes it prefers none."""
    weight, *others = (t.detach() for t in layer)
    weight[0, 0, 0, 0] = 1.0  # zero is the one place with a sign of its own
    for seed in range(5):
        turn = torch.randint(2, weight.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        assert (turn < 0).any()
        turned, still = (weight * t for t in (turn, 1))
        for kernel in (turned, still):
            kernel.requires_grad_()
        losses = [kernel_loss(kernel, *others, 0.37) for kernel in (turned, still)]
        torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
        for loss in losses:
            loss.backward()
        assert relative(turned.grad, still.grad * turn) < 1e-12


def test_feature_loss_is_equation_8_and_moves_features_and_spreads_but_no_centre():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(7, 3, dtype=torch.float64, generator=generator).requires_grad_()
    centers = torch.randn(4, 3, dtype=torch.float64, generator=generator).requires_grad_()
    sigma = (torch.rand(4, 3, dtype=torch.float64, generator=generator) + 0.5).requires_grad_()
    labels = torch.tensor([0, 1, 1, 3, 0, 3, 3])
    loss = feature_loss(features, labels, centers, sigma)
    loss.backward()
    args = (features.detach(), labels, centers.detach(), sigma.detach())
    assert float(loss.detach()) == pytest.approx(reference.eq8_feature(*args), rel=1e-12)
    assert centers.grad is None
    step = 1e-6
    for position, tensor in ((0, features), (3, sigma)):
        for index in torch.cartesian_prod(*map(torch.arange, tensor.shape)).tolist():
            moved = [t.clone() for t in args]
            moved[position][tuple(index)] += step
            up = reference.eq8_feature(*moved)
            moved[position][tuple(index)] -= 2 * step
            slope = (up - reference.eq8_feature(*moved)) / (2 * step)
            assert float(tensor.grad[tuple(index)]) == pytest.approx(slope, abs=1e-7)


def test_feature_loss_gradient_written_out():
    features = torch.randn(5, 2, dtype=torch.float64).requires_grad_()
    centers, labels = torch.randn(3, 2, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    sigma = (torch.rand(3, 2, dtype=torch.float64) + 0.5).requires_grad_()
    feature_loss(features, labels, centers, sigma).backward()
    grad_f, grad_s = torch.zeros_like(features), torch.zeros_like(sigma)
    for b, y in enumerate(labels.tolist()):
        for k in range(2):
            d = float(features[b, k].detach() - centers[y, k])
            s = float(sigma.detach()[y, k])
            grad_f[b, k] = (d + d / s**2) / 5
            grad_s[y, k] += (-(d**2) / s**3 + 1 / s) / 5
    assert relative(features.grad, grad_f) < 1e-10
    assert relative(sigma.grad, grad_s) < 1e-10


def test_centres_move_by_the_centre_loss_rule():
    centers = torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]])
    features = torch.tensor([[2.0, 0.0], [4.0, 2.0], [0.0, 1.0]])
    moved = update_centers(centers, features, torch.tensor([0, 0, 1]), 0.5)
    # class 0: -0.5 * ((0-2)+(0-4), (0-0)+(0-2)) / (1+2); class 1: -0.5 * (1-0, 1-1) / (1+1)
    assert torch.allclose(moved, torch.tensor([[1.0, 1 / 3], [0.75, 1.0], [5.0, 5.0]]))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_packing_keeps_every_sign_in_one_bit(filters, n, seed):
    weight = torch.randn(filters, n, generator=torch.Generator().manual_seed(seed))
    packed = pack_signs(weight)
    assert packed.dtype == torch.uint8
    assert packed.shape == (filters, -(-n // 8))
    for i in range(filters):
        for k in range(n):
            assert (int(packed[i, k // 8]) >> (k % 8)) & 1 == (weight[i, k] >= 0)
    assert torch.equal(unpack_signs(packed, (filters, n)), sign(weight))


def test_unpacking_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="needs"):
        unpack_signs(torch.zeros(2, 1, dtype=torch.uint8), (2, 9))
    with pytest.raises(ValueError, match="needs"):
        unpack_signs(torch.zeros(2, 1), (2, 8))


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"padding": (1, 2), "stride": (2, 1)},
        {"dilation": (2, 2), "padding": (2, 2)},
        {"groups": 2, "padding": (1, 1)},
    ],
)
def test_the_convolution_of_signs_has_conv2ds_values_and_gradients(shape):
    generator = torch.Generator().manual_seed(0)
    a = sign(torch.randn(2, 4, 7, 6, dtype=torch.float64, generator=generator)).requires_grad_()
    s = sign(torch.randn(6, 4 // shape.get("groups", 1), 3, 3, dtype=torch.float64, generator=generator))
    s.requires_grad_()
    wanted = torch.nn.functional.conv2d(a, s, None, **shape)
    grad = torch.randn(wanted.shape, dtype=torch.float64, generator=generator)
    expected = torch.autograd.grad(wanted, (a, s), grad)
    y = convolve_signs(a, s, **shape)
    assert torch.equal(y, wanted)
    for got, want in zip(torch.autograd.grad(y, (a, s), grad), expected, strict=True):
        assert relative(got, want) < 1e-12


def test_the_convolution_of_signs_keeps_a_byte_an_activation():
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    a, s = sign(torch.randn(2, 4, 8, 8)).requires_grad_(), sign(torch.randn(4, 4, 3, 3)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        convolve_signs(a, s)
    assert [t.dtype for t in kept] == [torch.bool, torch.bool]


def test_the_convolution_of_signs_trains_under_autocast():
    a, s = sign(torch.randn(2, 4, 8, 8)).requires_grad_(), sign(torch.randn(4, 4, 3, 3)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = convolve_signs(a, s)
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert a.grad.dtype is torch.float32
    assert torch.equal(s.grad, torch.autograd.grad(torch.nn.functional.conv2d(a, s).sum(), s)[0])
