"""The methods beside BONN: each against loops in float64, then trained, packed, reloaded and exported."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bonn_plugin import Recipe, Session, ledger, load_packed, parse_recipe, save_packed, verify_packed
from bonn_plugin.check import forecast
from bonn_plugin.errors import ExportError
from bonn_plugin.export.openvino import export_openvino
from bonn_plugin.export.selftest import _Seen
from bonn_plugin.functional.methods import (
    Bases,
    abc_inputs,
    abc_weight,
    bireal_weight,
    bnn_weight,
    dorefa_input,
    dorefa_weight,
    first_shifts,
    pcnn_weight,
    projection_loss,
    reactnet_weight,
    ternarize_input,
    xnor_input_scale,
    xnor_weight,
)
from bonn_plugin.modifiers.methods import METHODS
from bonn_plugin.nn import MethodConv2d, PackedBasesConv2d, PackedConv2d, ProjectionConv2d, Role
from bonn_plugin.nn.operations import Macs, count_macs
from bonn_plugin.recipe import RecipeError, recipe_model
from bonn_plugin.report import make_report
from tests.reference import convolve

RECIPE = """
version: 1
name: method
model: {{name: bonn_resnet18, num_classes: 10, args: {{widths: [8, 8, 16, 16], shortcut: {shortcut}}}}}
data: {{name: digits, size: 32}}
training: {{epochs: 1, batch_size: 4, optimizer: {{name: adam, lr: 1e-2}}}}
modifiers: [{{type: binarize, {keys}}}{more}]
"""
VARIANTS = [
    "method: bonn",
    "method: bnn",
    "method: xnor",
    "method: xnor, input_scale: false",
    "method: xnor, threshold: always",
    "method: bwn",
    "method: dorefa",
    "method: dorefa, activation_bits: 1",
    "method: tbn",
    "method: abc",
    "method: abc, weight_bases: 3, activation_bases: 2",
    "method: bireal",
    "method: pcnn",
    "method: reactnet",
]


def recipe_for(keys: str, shortcut: str = "block", more: str = "") -> Recipe:
    return parse_recipe(RECIPE.format(keys=keys, shortcut=shortcut, more=more))


def seeded(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def weight_gradient(rule, weight: Tensor, upstream: Tensor) -> Tensor:
    """dL/dX where dL/dX̂ is ``upstream``: through sum_m scale_m signs_m, as a layer applies it."""
    x = weight.clone().requires_grad_()
    bases: Bases = rule(x)
    (bases.signs * bases.scale[..., None, None, None] * upstream).sum().backward()
    assert x.grad is not None
    return x.grad


def by_elements(weight: Tensor, formula) -> Tensor:
    """A tensor whose every element is ``formula(i, filter, value)``, by loops."""
    made = torch.empty_like(weight)
    for place in itertools.product(*map(range, weight.shape)):
        made[place] = formula(place, weight[place[0]].flatten().tolist(), float(weight[place]))
    return made


def mean_abs(values: list[float]) -> float:
    return sum(map(abs, values)) / len(values)


# X̂ and dL/dX of each method, written out from the papers; g is dL/dX̂
FORMULAS = {
    "bnn": (bnn_weight, lambda f, x, layer: math.copysign(1, x), lambda f, x, g, layer: g),
    "xnor": (
        xnor_weight,
        lambda f, x, layer: math.copysign(mean_abs(f), x),
        lambda f, x, g, layer: g * (1 / len(f) + (mean_abs(f) if abs(x) <= 1 else 0)),
    ),
    "dorefa": (
        dorefa_weight,
        lambda f, x, layer: math.copysign(mean_abs(layer), x),
        lambda f, x, g, layer: g,
    ),
    "bireal": (
        bireal_weight,
        lambda f, x, layer: math.copysign(mean_abs(f), x),
        lambda f, x, g, layer: g * mean_abs(f) if abs(x) < 1 else 0,
    ),
    "reactnet": (
        reactnet_weight,
        lambda f, x, layer: math.copysign(mean_abs(f), x),
        lambda f, x, g, layer: g if abs(x) <= 1 else 0,
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_kernel_and_its_gradient_are_those_of_the_paper(name: str) -> None:
    rule, value, gradient = FORMULAS[name]
    weight, upstream = seeded(3, 2, 3, 3), torch.sin(torch.arange(54.0, dtype=torch.float64)).view(3, 2, 3, 3)
    assert (weight.abs() > 1).any()
    assert (weight.abs() < 1).any()
    layer = weight.flatten().tolist()
    bases = rule(weight)
    assert set(bases.signs.unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(
        bases.signs[0] * bases.scale[0][:, None, None, None], by_elements(weight, lambda p, f, x: value(f, x, layer))
    )
    expected = by_elements(weight, lambda p, f, x: gradient(f, x, float(upstream[p]), layer))
    torch.testing.assert_close(weight_gradient(rule, weight, upstream), expected)


def test_zero_is_positive_and_a_filter_of_zeros_has_a_finite_gradient() -> None:
    for rule in (bnn_weight, xnor_weight, dorefa_weight, bireal_weight, reactnet_weight):
        bases = rule(torch.zeros(2, 1, 3, 3))
        assert torch.equal(bases.signs, torch.ones(1, 2, 1, 3, 3))
        assert weight_gradient(rule, torch.zeros(2, 1, 3, 3), torch.ones(2, 1, 3, 3)).isfinite().all()


def test_pcnn_projects_and_both_gradients_are_those_of_the_paper() -> None:
    weight, upstream = seeded(3, 2, 3, 3), torch.cos(torch.arange(54.0, dtype=torch.float64)).view(3, 2, 3, 3)
    plane = torch.linspace(0.5, 1.5, 9, dtype=torch.float64).view(3, 3)
    c, w = weight.clone().requires_grad_(), plane.clone().requires_grad_()
    bases = pcnn_weight(c, w)
    (bases.signs * bases.scale[..., None, None, None] * upstream).sum().backward()
    a = mean_abs(weight.flatten().tolist())
    torch.testing.assert_close(
        bases.signs[0] * bases.scale[0], by_elements(weight, lambda p, f, x: math.copysign(a, x))
    )
    to_c = by_elements(
        weight,
        lambda p, f, x: float(upstream[p]) * float(plane[p[2:]]) if abs(float(plane[p[2:]]) * x) <= 1 else 0.0,
    )
    to_w = torch.zeros(3, 3, dtype=torch.float64)
    for p in itertools.product(*map(range, weight.shape)):
        if abs(float(plane[p[2:]] * weight[p])) <= 1:
            to_w[p[2:]] += upstream[p] * weight[p]
    torch.testing.assert_close(c.grad, to_c)
    torch.testing.assert_close(w.grad, to_w)


def test_the_projection_loss_is_the_distance_to_the_projected_kernel() -> None:
    weight, plane = seeded(3, 2, 3, 3), torch.linspace(0.5, 1.5, 9, dtype=torch.float64).view(3, 3)
    a = mean_abs(weight.flatten().tolist())
    expected = sum(
        (math.copysign(a, float(weight[p])) - float(plane[p[2:]] * weight[p])) ** 2 / 2
        for p in itertools.product(*map(range, weight.shape))
    )
    c = weight.clone().requires_grad_()
    loss = projection_loss(c, plane)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected)
    torch.testing.assert_close(c.grad, plane * (plane * weight - a * torch.where(weight >= 0, 1.0, -1.0)))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_abc_bases_are_shifted_signs_and_their_scales_the_least_squares_fit(count: int) -> None:
    import numpy as np

    weight = seeded(4, 3, 3, 3)
    bases = abc_weight(weight, count)
    for i in range(4):
        x = weight[i].flatten().numpy()
        shifts = [-1 + 2 * m / (count - 1) for m in range(count)] if count > 1 else [0.0]
        signs = np.stack([np.where(x - x.mean() + u * x.std() >= 0, 1.0, -1.0) for u in shifts], axis=1)
        np.testing.assert_array_equal(bases.signs[:, i].flatten(1).numpy().T, signs)
        alpha, *_ = np.linalg.lstsq(signs, x, rcond=None)
        np.testing.assert_allclose(bases.scale[:, i].numpy(), alpha, atol=1e-10)
    upstream = torch.ones_like(weight)
    torch.testing.assert_close(
        weight_gradient(lambda x: abc_weight(x, count), weight, upstream),
        bases.scale.sum(0)[:, None, None, None].expand_as(weight),
    )


def test_abc_activations_switch_at_their_shift_and_pass_the_gradient_within_the_clip() -> None:
    x = torch.linspace(-2, 2, 81, dtype=torch.float64).requires_grad_()
    shifts = torch.tensor([0.5, 1.0, -0.25], dtype=torch.float64, requires_grad=True)
    codes = abc_inputs(x, shifts)
    sum((k + 1) * code.sum() for k, code in enumerate(codes)).backward()
    for code, v in zip(codes, shifts.tolist(), strict=True):
        assert code.tolist() == [1.0 if min(max(value + v, 0), 1) >= 0.5 else -1.0 for value in x.tolist()]
    inside = [[0 <= value + v <= 1 for value in x.tolist()] for v in shifts.tolist()]
    assert x.grad is not None
    assert x.grad.tolist() == [sum((k + 1) * inside[k][i] for k in range(3)) for i in range(81)]
    assert shifts.grad is not None
    assert shifts.grad.tolist() == [(k + 1) * sum(inside[k]) for k in range(3)]
    assert first_shifts(1).tolist() == [0.5]
    assert first_shifts(3).tolist() == [1.5, 0.5, -0.5]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_dorefa_activations_are_rounded_to_k_bits(bits: int) -> None:
    x = torch.linspace(-0.51, 1.52, 61, dtype=torch.float64).requires_grad_()
    code = dorefa_input(x, bits)
    levels = 2**bits - 1
    assert code.tolist() == [round(levels * min(max(value, 0.0), 1.0)) for value in x.tolist()]
    (code / levels).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, ((x >= 0) & (x <= 1)).double())


def test_tbn_activations_are_zero_within_a_share_of_each_samples_mean() -> None:
    x = torch.tensor([[0.1, -0.2, 0.5, -2.0], [10.0, -3.0, 4.0, 3.0]], dtype=torch.float64, requires_grad=True)
    code = ternarize_input(x)
    # means 0.7 and 5: edges 0.28 and 2
    assert code.tolist() == [[0, 0, 1, -1], [1, -1, 1, 1]]
    code.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1, 1, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("groups", [1, 2])
def test_xnor_scales_each_output_by_the_mean_magnitude_of_its_window(groups: int) -> None:
    x = seeded(2, 4, 6, 5)
    k = xnor_input_scale(x, (3, 3), (2, 1), (1, 1), (1, 1), groups)
    for b, g, row, column in itertools.product(*map(range, k.shape)):
        total = 0.0
        for c, i, j in itertools.product(range(4 // groups), range(3), range(3)):
            y, z = 2 * row + i - 1, column + j - 1
            if 0 <= y < 6 and 0 <= z < 5:
                total += abs(float(x[b, g * 4 // groups + c, y, z]))
        assert float(k[b, g, row, column]) == pytest.approx(total / (9 * 4 / groups))


def test_a_layer_is_the_sum_over_bases_and_codes_with_the_gradient_of_each() -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 4, 3, 2, 1).double()
    config = recipe_for("method: abc, weight_bases: 2, activation_bases: 2").modifiers[0]
    layer = METHODS["abc"].make(conv, config)
    x = seeded(2, 3, 5, 5)
    bases = abc_weight(conv.weight.detach(), 2)
    expected = torch.zeros(2, 4, 3, 3, dtype=torch.float64)
    for code in abc_inputs(x, first_shifts(2).double()):
        for m in range(2):
            y = convolve(code, bases.signs[m], 2, 1, 1, 1)
            expected += 0.5 * bases.scale[m][:, None, None] * y
    torch.testing.assert_close(layer(x), expected + conv.bias[:, None, None], check_dtype=False)


def trained(keys: str, shortcut: str = "block", more: str = "") -> tuple[Session, torch.nn.Module, Tensor]:
    torch.manual_seed(0)
    session = Session(recipe_for(keys, shortcut, more), steps_per_epoch=3)
    model = session.prepare(recipe_model(session.recipe))
    optimizer = torch.optim.Adam(session.param_groups(), lr=1e-2)
    x, y = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
    for _ in range(3):
        optimizer.zero_grad()
        (torch.nn.functional.cross_entropy(model(x), y) + session.loss(labels=y).total).backward()
        optimizer.step()
        session.step()
    return session, model.eval(), x


@pytest.mark.parametrize("keys", VARIANTS)
def test_each_method_trains_packs_reloads_and_gives_the_same_bits(keys: str, tmp_path: Path) -> None:
    session, model, x = trained(keys)
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    assert all(m.weight.grad.abs().sum() > 0 for m in model.modules() if isinstance(m, MethodConv2d))
    packed = session.convert()
    save_packed(packed, tmp_path / "out", session.recipe)
    with torch.no_grad():
        logits = model(x)
        assert torch.equal(logits, packed(x))
        assert torch.equal(logits, load_packed(tmp_path / "out").eval()(x))
    assert verify_packed(tmp_path / "out").identical
    book = ledger(packed)
    bases = 3 if "weight_bases: 3" in keys else 1
    weights = sum(c.weight.numel() for c in model.modules() if hasattr(c, "latent_weight"))
    stored = [entry for entry in book.entries if entry.role is Role.BINARY_WEIGHT]
    assert sum(entry.original_bits for entry in stored) == 32 * weights
    # ABC's three bases may hold fewer filters than weights only where a method merges equal ones
    assert book.bits(Role.BINARY_WEIGHT) <= bases * weights
    if bases > 1:
        assert book.bits(Role.BINARY_WEIGHT) == bases * weights


def test_three_bases_take_three_bits_a_weight_and_compress_less() -> None:
    rates = [ledger(trained(f"method: abc, weight_bases: {m}")[0].convert()).rate() for m in (1, 2, 3)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(ledger(trained("method: bonn")[0].convert()).rate(), rel=0.05)


def test_operations_are_counted_by_the_bits_of_the_input() -> None:
    def counted(keys: str) -> tuple[int, int]:
        seen = forecast(recipe_for(keys), recipe_model(recipe_for(keys)))
        return seen.after.binary, seen.after.real

    binary, real = counted("method: bnn")
    assert counted("method: dorefa, activation_bits: 2") == (2 * binary, real)
    assert counted("method: tbn") == (2 * binary, real)
    remarks = {
        layer.remark for layer in forecast(recipe_for("method: tbn"), recipe_model(recipe_for("method: tbn"))).layers
    }
    assert remarks == {"read as -1, 0 or +1"}
    assert counted("method: abc, weight_bases: 3, activation_bases: 2") == (6 * binary, real)
    assert counted("method: bwn") == (0, real + binary)


def test_bnn_keeps_its_weights_within_one() -> None:
    torch.manual_seed(0)
    session = Session(recipe_for("method: bnn"), steps_per_epoch=3)
    model = session.prepare(recipe_model(session.recipe))
    layer = next(m for m in model.modules() if isinstance(m, MethodConv2d))
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    with torch.no_grad():
        layer.weight.mul_(100)
    assert layer.weight.abs().max() > 1
    session.step()
    assert layer.weight.abs().max() == 1


def test_pcnn_keeps_its_plane_positive() -> None:
    session = Session(recipe_for("method: pcnn"), steps_per_epoch=3)
    model = session.prepare(recipe_model(session.recipe))
    layer = next(m for m in model.modules() if isinstance(m, ProjectionConv2d))
    with torch.no_grad():
        layer.projection[0, 0] = -1
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    session.step()
    assert layer.projection[0, 0].item() == pytest.approx(0.01 * 8 / 9)
    assert (layer.projection.flatten()[1:] == 1).all()


def test_the_projection_loss_is_added_and_moves_the_plane() -> None:
    session, model, _ = trained("method: pcnn", more=", {type: projection_loss, lambda: 0.5}")
    _, without, _ = trained("method: pcnn")
    pairs = zip(model.modules(), without.modules(), strict=True)
    planes = [(m.projection, o.projection) for m, o in pairs if isinstance(m, ProjectionConv2d)]
    assert len(planes) == 16
    assert all((one != other).any() for one, other in planes)
    fresh = Session(session.recipe, steps_per_epoch=1)
    prepared = fresh.prepare(recipe_model(session.recipe))
    expected = sum(
        0.5 * projection_loss(m.weight.detach().double(), torch.ones(3, 3).double())
        for m in prepared.modules()
        if isinstance(m, ProjectionConv2d)
    )
    found = fresh.loss(labels=torch.zeros(1)).terms["projection"].detach()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("keys", ["method: bnn", "method: xnor", "method: xnor, threshold: always", "method: reactnet"])
def test_a_method_with_one_bit_activations_can_be_exported(keys: str, tmp_path: Path) -> None:
    session, _, x = trained(keys, shortcut="conv")
    save_packed(session.convert(), tmp_path, session.recipe)
    info = export_openvino(load_packed(tmp_path), tmp_path, (1, 3, 32, 32), [x])
    assert set(info.binary_layers.values()) == {"bits"}


def test_the_export_of_other_activations_is_refused_with_the_reason(tmp_path: Path) -> None:
    session, _, x = trained("method: tbn")
    save_packed(session.convert(), tmp_path, session.recipe)
    with pytest.raises(ExportError, match=r"reads its input as -1, 0 or \+1, with 1 base"):
        export_openvino(load_packed(tmp_path), tmp_path, (1, 3, 32, 32), [x])


@pytest.mark.parametrize(
    ("keys", "more", "message"),
    [
        ("method: xnro", "", r"method must be .*'xnor'.* Did you mean 'xnor'\?"),
        ("method: bnn, delta: 0.3", "", "'delta' has no meaning for method 'bnn': it is of tbn"),
        ("method: bwn, ste: clip", "", "'ste' has no meaning for method 'bwn'"),
        ("method: dorefa, threshold: always", "", "'threshold' has no meaning for method 'dorefa'"),
        ("method: bireal, bound: 2.0", "", "method 'bireal' sets it: ste: clip takes a bound"),
        ("method: xnor, weights: real", "", "'weights' has no meaning for method 'xnor': it is of bonn"),
        ("method: dorefa, activation_bits: 9", "", "activation_bits must be less than or equal to 8"),
        ("method: abc, weight_bases: 0", "", "weight_bases must be greater than or equal to 1"),
        (
            "method: xnor",
            ", {type: kernel_loss, lambda: 1e-4, nu: 1e-3}",
            "kernel_loss is for binarize with method 'bonn'",
        ),
        ("method: bnn", ", {type: filter_merge, keep: 0.5}", "filter_merge is for binarize with method 'bonn'"),
        (
            "method: bonn",
            ", {type: projection_loss, lambda: 1e-4}",
            "projection_loss is for binarize with method 'pcnn'",
        ),
    ],
)
def test_a_setting_that_a_method_does_not_have_is_a_mistake(keys: str, more: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_for(keys, more=more)


def test_a_method_sets_what_its_paper_says_and_the_recipe_may_say_otherwise() -> None:
    config = recipe_for("method: reactnet").modifiers[0]
    assert (config.ste, config.threshold, config.threshold_init, config.activation) == (
        "polynomial",
        "always",
        "zero",
        "rprelu",
    )
    assert recipe_for("method: bireal").modifiers[0].ste == "polynomial"
    assert recipe_for("method: bireal, ste: clip").modifiers[0].ste == "clip"
    assert recipe_for("method: reactnet, threshold: never").modifiers[0].threshold == "never"


def test_the_report_of_real_activations_does_not_say_that_nothing_is_binarised() -> None:
    session, _, x = trained("method: bwn")
    original = recipe_model(session.recipe)
    report = make_report("method", "bonn_resnet18", session.convert(), original, x[:1], 1, 1)
    assert not any("nothing is binarised" in note for note in report.notes)


def test_sums_of_many_bits_stay_finite_in_half_precision() -> None:
    conv = torch.nn.Conv2d(64, 2, 3, padding=1)
    with torch.no_grad():
        conv.weight.fill_(0.1)
    config = recipe_for("method: dorefa, activation_bits: 8").modifiers[0]
    layer = METHODS["dorefa"].make(conv, config)
    x = torch.ones(1, 64, 5, 5)
    with torch.autocast("cpu", torch.float16):
        y = layer(x.half())
    assert y.isfinite().all()
    torch.testing.assert_close(y.float(), layer(x), rtol=0.01, atol=0.01)


def test_the_self_test_replays_a_tie_of_a_scaled_input() -> None:
    layer = MethodConv2d(torch.nn.Conv2d(2, 2, 3, padding=1), xnor_weight, input_scale=True)
    layer.add_threshold(from_input=False)
    with torch.no_grad():
        layer.threshold.copy_(torch.tensor([0.5, -0.3]))
    packed = layer.pack()
    x = torch.randn(1, 2, 6, 6)
    x[0, 0, 0, 0], x[0, 1, 0, 0] = 0.5, -0.3
    t = packed.threshold[:, None, None]
    for theirs in ((x - t) >= 0, (x - t) > 0):
        made = _Seen(1).sign(packed, x, theirs)
        assert torch.equal((made - t) >= 0, theirs)
        torch.testing.assert_close((made - t).abs(), (x - t).abs())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"code": {"kind": "waves"}}, "unknown input code 'waves'"),
        ({"code": None}, "not the input code"),
        ({"code": {"kind": "bits", "bits": 40}}, "activations of 40 bits"),
        ({"code": {"kind": "ternary", "delta": "x"}}, "delta 'x' is not a number"),
        ({"code": {"kind": "signs", "count": 0}}, "0 signs of an input"),
        ({"bases": 1000}, "1000 bases of a weight"),
    ],
)
def test_a_stored_layer_whose_description_makes_no_sense_is_refused(change: dict, message: str) -> None:
    packed = trained("method: tbn")[0].convert()
    layer = next(m for m in packed.modules() if isinstance(m, PackedBasesConv2d))
    assert isinstance(PackedBasesConv2d.from_spec(layer.spec()), PackedBasesConv2d)
    with pytest.raises(ValueError, match=message):
        PackedBasesConv2d.from_spec({**layer.spec(), **change})


def test_a_scale_a_filter_outlives_merged_filters() -> None:
    """Filters of equal signs are stored once, and each keeps its own scale."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 6, 3, padding=1)
    with torch.no_grad():
        conv.weight[3] = 2 * conv.weight[0]
        conv.weight[4] = -3 * conv.weight[1]
    layer = MethodConv2d(conv, xnor_weight, input_scale=True).eval()
    packed = layer.pack()
    assert isinstance(packed, PackedConv2d)
    assert packed.filters.stored == 4
    x = torch.randn(2, 3, 7, 7)
    assert torch.equal(layer(x), packed(x))
    torch.testing.assert_close(
        packed.dense_weight(), torch.where(conv.weight >= 0, 1, -1) * conv.weight.abs().mean((1, 2, 3), keepdim=True)
    )


def test_what_the_scale_of_the_input_costs_is_counted() -> None:
    conv = torch.nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    layer = MethodConv2d(conv, xnor_weight, input_scale=True)
    x = torch.randn(1, 4, 8, 8)
    additions, box, products = 4 * 8 * 8, 2 * 9 * 4 * 4, 6 * 4 * 4
    for module in (layer, layer.pack()):
        assert count_macs(module, x)[""] == Macs(binary=6 * 2 * 9 * 4 * 4, real=additions + box + products)
    plain = MethodConv2d(conv, xnor_weight)
    for module in (plain, plain.pack()):
        assert count_macs(module, x)[""] == Macs(binary=6 * 2 * 9 * 4 * 4)


def test_operations_of_xnor_net_are_a_little_above_those_without_its_scale() -> None:
    """Resnet18 at 224 px, counted a layer at a time: (C_in, C_out, output size, stride) of its 16 binary layers."""
    layers = [(64, 64, 56, 1)] * 4
    for c, size in ((128, 28), (256, 14), (512, 7)):
        layers += [(c // 2, c, size, 2)] + [(c, c, size, 1)] * 3
    extra = sum(a * (s * n) ** 2 + 9 * n**2 + b * n**2 for a, b, n, s in layers)
    ops = []
    for keys in ("method: xnor", "method: xnor, input_scale: false"):
        loaded = parse_recipe(f"""
version: 1
name: operations
model: {{task: classification, name: resnet18, num_classes: 1000}}
data: {{name: imagefolder, root: nowhere}}
training: {{epochs: 1, batch_size: 4, optimizer: {{name: adam, lr: 1e-2}}}}
modifiers: [{{type: binarize, {keys}}}]
""")
        ops.append(forecast(loaded, recipe_model(loaded)).after.ops)
    assert ops[0] - ops[1] == extra
    assert [float(f"{n:.2e}") for n in ops] == [1.67e8, 1.64e8]


@pytest.mark.parametrize("keys", VARIANTS)
def test_a_grouped_strided_layer_with_a_bias_packs_to_the_same_bits(keys: str) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(4, 6, 3, 2, 1, groups=2)
    config = recipe_for(keys).modifiers[0]
    layer = METHODS[config.method].make(conv, config)
    assert layer.weight is conv.weight
    packed = layer.pack()
    again = type(packed).from_spec(packed.spec())
    again.load_state_dict(packed.state_dict())
    x = torch.randn(2, 4, 7, 7)
    with torch.no_grad():
        for image in (x, x[0]):
            assert torch.equal(layer(image), packed(image))
            assert torch.equal(layer(image), again(image))
    assert layer(x).shape == (2, 6, 4, 4)


@pytest.mark.parametrize("keys", VARIANTS)
def test_a_layer_trains_under_bfloat16(keys: str) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(4, 6, 3, 1, 1)
    config = recipe_for(keys).modifiers[0]
    layer = METHODS[config.method].make(conv, config)
    x = torch.randn(2, 4, 7, 7)
    whole = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x.to(torch.bfloat16).requires_grad_())
        half.float().square().mean().backward()
    torch.testing.assert_close(half.float(), whole, rtol=0.1, atol=0.1 * float(whole.detach().abs().max()))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
