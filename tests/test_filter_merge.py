"""Filters merged: grouping, the pruning loss, the modifier, and packed layers with an index."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from bonn_plugin import Session, ledger, load_packed, parse_recipe, save_packed, verify_packed
from bonn_plugin.check import forecast
from bonn_plugin.errors import BonnError, ModelError
from bonn_plugin.functional import (
    group_filters,
    group_mean,
    merge_filters,
    pack_signs,
    pruning_loss,
    sensitivity_keeps,
    unpack_signs,
)
from bonn_plugin.nn import BinaryConv2d, ConvGeometry, FilterMerge, PackedConv2d, Role
from bonn_plugin.nn.packed_conv import index_dtype
from bonn_plugin.recipe import Recipe, recipe_model
from bonn_plugin.report import make_report, to_markdown, write_plots
from bonn_plugin.train import Quiet, Runner

BASE = r"""
version: 1
name: merged
model: {{task: classification, name: {net}, num_classes: 10, args: {args}}}
data: {{name: digits, size: 8}}
training: {{epochs: {epochs}, batch_size: 64, optimizer: {{name: adam, lr: 1e-2}}}}
modifiers:
  - {{type: binarize}}
"""


def recipe(*modifiers: str, net: str = "bonn_wrn22_16", args: str = "{depth: 10}", epochs: int = 3) -> Recipe:
    return parse_recipe(BASE.format(net=net, args=args, epochs=epochs) + "".join(f"  - {m}\n" for m in modifiers))


def run(loaded: Recipe, folder: Path, steps: int = 4) -> Runner:
    """A runner whose epochs have few steps."""
    runner = Runner(loaded, folder, torch.device("cpu"), Quiet())
    return shorten(runner, steps)


def shorten(runner: Runner, steps: int) -> Runner:
    runner.task.splits.train.images = runner.task.splits.train.images[: 64 * steps]
    runner.task.splits.test.images = runner.task.splits.test.images[:32]
    runner.session.clock.steps_per_epoch = len(runner.task.loader)
    assert len(runner.task.loader) == steps
    return runner


def binary_layers(model: nn.Module) -> list[BinaryConv2d]:
    return [m for m in model.modules() if isinstance(m, BinaryConv2d)]


# --- grouping and means -------------------------------------------------------------------------------------


def test_kmeans_finds_the_groups_that_are_there() -> None:
    centers = torch.randn(4, 3, 3, 3) * 5
    truth = torch.tensor([0, 1, 0, 2, 3, 3, 1, 0])
    groups = group_filters(centers[truth] + 0.01 * torch.randn(8, 3, 3, 3), 0.5, seed=0)
    assert groups.dtype == torch.int64
    assert groups.tolist() == truth.tolist()  # numbered by first appearance


@pytest.mark.parametrize("shape", [(16, 3, 3, 3), (48, 4, 3, 3), (12, 40, 3, 3)])
def test_groups_do_not_depend_on_anything_but_weight_keep_and_seed(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    first = group_filters(weight, 0.25, 3)
    torch.manual_seed(99)
    assert torch.equal(first, group_filters(weight, 0.25, 3))
    assert int(first.max()) + 1 == shape[0] // 4


def test_keep_of_one_and_tiny_keep() -> None:
    weight = torch.randn(10, 2, 3, 3)
    assert group_filters(weight, 1.0, 0).tolist() == list(range(10))
    assert group_filters(weight, 0.001, 0).tolist() == [0] * 10


def test_fewer_different_filters_than_groups_gives_fewer_groups() -> None:
    weight = torch.randn(2, 2, 3, 3)[torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])]
    assert group_filters(weight, 0.75, 0).tolist() == [0, 1, 0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.5, math.nan])
def test_keep_out_of_range(keep: float) -> None:
    with pytest.raises(ValueError, match="keep must be"):
        group_filters(torch.randn(4, 1, 3, 3), keep, 0)


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        group_filters(torch.full((4, 1, 3, 3), math.nan), 0.5, 0)


def slow_mean(weight: Tensor, groups: Tensor) -> Tensor:
    rows = []
    for i in range(len(weight)):
        members = [weight[j] for j in range(len(weight)) if groups[j] == groups[i]]
        rows.append(sum(members) / len(members))
    return torch.stack(rows)


def test_merged_weight_and_its_gradient_against_loops() -> None:
    groups = torch.tensor([0, 1, 0, 2, 1, 0])
    for gamma in (0.0, 0.3, 0.8, 1.0):
        fast = torch.randn(6, 2, 3, 3, dtype=torch.float64, requires_grad=True)
        slow = fast.detach().clone().requires_grad_()
        g = torch.randn(6, 2, 3, 3, dtype=torch.float64)
        y = merge_filters(fast, groups, gamma)
        z = (1 - gamma) * slow + gamma * slow_mean(slow, groups)
        torch.testing.assert_close(y, z)
        (y * g).sum().backward()
        (z * g).sum().backward()
        torch.testing.assert_close(fast.grad, slow.grad)


def test_at_gamma_one_members_and_their_gradients_are_equal_bit_for_bit() -> None:
    weight = torch.randn(32, 16, 3, 3, requires_grad=True)
    groups = torch.arange(32) % 5
    merged = merge_filters(weight, groups, 1.0)
    g = torch.randn(32, 16, 3, 3)
    merged.backward(g)
    for group in range(5):
        rows = groups == group
        assert torch.equal(merged[rows], merged[rows][:1].expand_as(merged[rows]))
        assert torch.equal(weight.grad[rows], weight.grad[rows][:1].expand_as(weight.grad[rows]))
        torch.testing.assert_close(weight.grad[rows][0], g[rows].mean(0))


def slow_pruning_loss(weight: Tensor, groups: Tensor, sigma: Tensor, nu: float) -> Tensor:
    mean = slow_mean(weight, groups)
    total = weight.new_zeros(())
    for i in range(len(weight)):
        spread = sigma[groups[i]].expand(weight[i].shape) if sigma.dim() == 1 else sigma[groups[i]]
        for x, m, s in zip(weight[i].flatten(), mean[i].flatten(), spread.flatten(), strict=True):
            total = total + (x - m) ** 2 + nu * (x - m) ** 2 / s**2 + nu * torch.log(s**2)
    return total


@pytest.mark.parametrize("diagonal", [False, True])
def test_pruning_loss_and_gradients_against_loops(diagonal: bool) -> None:
    weight = torch.randn(5, 2, 2, 2, dtype=torch.float64)
    groups = torch.tensor([0, 1, 0, 1, 2])
    sigma = torch.rand((3, 2, 2, 2) if diagonal else (3,), dtype=torch.float64) + 0.3
    leaves = [(weight.clone().requires_grad_(), sigma.clone().requires_grad_()) for _ in range(2)]
    values = []
    for function, (x, s) in zip((pruning_loss, slow_pruning_loss), leaves, strict=True):
        value = function(x, groups, s, 0.07)
        (3 * value).backward()
        values.append(value)
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(leaves[0][0].grad, leaves[1][0].grad)
    torch.testing.assert_close(leaves[0][1].grad, leaves[1][1].grad)


def test_pruning_loss_refuses_sigma_of_another_shape() -> None:
    with pytest.raises(ValueError, match="sigma is"):
        pruning_loss(torch.randn(4, 2, 3, 3), torch.zeros(4, dtype=torch.long), torch.ones(1, 5), 1.0)


def test_sensitivity_keeps_more_of_the_layer_whose_filters_differ() -> None:
    alike = torch.randn(2, 8, 3, 3)[torch.arange(16) % 2] + 0.01 * torch.randn(16, 8, 3, 3)
    different = torch.randn(16, 8, 3, 3)
    shares = sensitivity_keeps([alike, different], 0.5)
    assert shares[0] < 0.5 < shares[1]
    assert sum(shares) / 2 == pytest.approx(0.5, abs=1 / 16)
    assert sensitivity_keeps([alike, different], 1.0) == [1.0, 1.0]
    assert min(sensitivity_keeps([alike, different], 0.001)) >= 1 / 16


# --- the packed layer ---------------------------------------------------------------------------------------


def dense_reference(x: Tensor, weight: Tensor, scale: float, stride: int) -> Tensor:
    signs = torch.where(weight >= 0, 1.0, -1.0)
    return torch.nn.functional.conv2d(torch.where(x >= 0, 1.0, -1.0), signs, None, stride, 1) * scale


def geometry(c_in: int, c_out: int, stride: int = 1, groups: int = 1) -> ConvGeometry:
    return ConvGeometry(c_in, c_out, (3, 3), (stride, stride), (1, 1), (1, 1), groups)


def test_equal_and_opposite_filters_are_stored_once_and_computed_exactly() -> None:
    unique = torch.randn(3, 5, 3, 3)
    weight = torch.stack([unique[0], -unique[0], unique[1], 2 * unique[0], unique[2], -unique[1], unique[2]])
    packed = PackedConv2d.from_dense(geometry(5, 7, 2), weight, torch.tensor(0.37), None, None)
    assert packed.weight_packed.shape == (3, 6)
    assert packed.weight_index.tolist() == [0, 0, 1, 0, 2, 1, 2]
    assert packed.weight_index.dtype == torch.uint8
    assert packed.output_sign().tolist() == [1, -1, 1, 1, 1, -1, 1]
    x = torch.randn(2, 5, 9, 9)
    assert torch.equal(packed(x), dense_reference(x, weight, 0.37, 2))
    assert torch.equal(packed.dense_weight(), torch.where(weight >= 0, 1.0, -1.0) * 0.37)
    stored = packed.stored_tensors()
    assert stored["weight_packed"].needed_bits == 3 * 45
    assert stored["weight_packed"].original_elements == 7 * 45
    assert stored["weight_index"].needed_bits == 7 * 2
    assert stored["weight_index"].written_bits == 7 * 8
    assert stored["weight_sign"].needed_bits == 7
    assert stored["weight_sign"].written_bits == 8
    assert stored["weight_index"].role == stored["weight_sign"].role == Role.INDEX
    assert packed.macs(packed(x)).binary == 3 * 45 * 5 * 5


def test_nothing_merged_nothing_more_stored() -> None:
    packed = PackedConv2d.from_dense(geometry(5, 7), torch.randn(7, 5, 3, 3), torch.tensor(1.0), None, None)
    assert set(packed.stored_tensors()) == {"weight_packed", "weight_scale"}
    assert packed.output_sign() is None
    assert packed.spec()["unique"] == 7


def test_one_filter_for_all_needs_no_index_bits() -> None:
    weight = torch.randn(1, 5, 3, 3).expand(7, 5, 3, 3)
    packed = PackedConv2d.from_dense(geometry(5, 7), weight, torch.tensor(1.0), None, None)
    assert packed.stored_tensors()["weight_index"].needed_bits == 0
    assert packed.weight_sign is None


def test_grouped_convolutions_stay_unmerged() -> None:
    weight = torch.randn(1, 2, 3, 3).expand(6, 2, 3, 3)
    packed = PackedConv2d.from_dense(geometry(6, 6, groups=3), weight, torch.tensor(1.0), None, None)
    assert packed.weight_index is None
    x = torch.randn(1, 6, 4, 4)
    signs = torch.where(weight >= 0, 1.0, -1.0)
    expected = torch.nn.functional.conv2d(torch.where(x >= 0, 1.0, -1.0), signs, None, 1, 1, 1, 3)
    assert torch.equal(packed(x), expected)


def test_zeroed_outputs_are_zero_and_cost_nothing() -> None:
    weight = torch.randn(6, 4, 3, 3)
    kept = torch.tensor([True, False, True, False, False, True])
    packed = PackedConv2d.from_dense(geometry(4, 6), weight, torch.tensor(0.5), None, None, kept)
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(packed(x), dense_reference(x, weight, 0.5, 1) * kept[:, None, None])
    assert packed.weight_packed.shape[0] == 3
    assert packed.filters.zeroed == 3
    assert packed.output_sign().tolist() == [1, 0, 1, 0, 0, 1]


def test_index_takes_the_smallest_dtype() -> None:
    assert [index_dtype(n) for n in (2, 256, 257, 2**15, 2**15 + 1)] == [
        torch.uint8, torch.uint8, torch.int16, torch.int16, torch.int32,
    ]  # fmt: skip


def test_spec_rebuilds_the_layer_and_refuses_nonsense() -> None:
    weight = torch.randn(1, 5, 3, 3) * torch.tensor([1.0, -1.0, 1.0])[:, None, None, None]
    packed = PackedConv2d.from_dense(geometry(5, 3), weight, torch.tensor(1.0), None, None)
    spec = json.loads(json.dumps(packed.spec()))
    assert spec["unique"] == 1
    again = PackedConv2d.from_spec(spec)
    assert {n: t.tensor.shape for n, t in again.stored_tensors().items()} == {
        n: t.tensor.shape for n, t in packed.stored_tensors().items()
    }
    for unique in (0, 4, "2", 1.5, True):
        with pytest.raises(ValueError, match="filters"):
            PackedConv2d.from_spec({**spec, "unique": unique})


NETWORKS = [
    ("bonn_resnet18", "{}", 32),
    ("bonn_wrn22_16", "{}", 16),
    ("resnet18", "{}", 32),
    ("resnet50", "{}", 32),
]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(("net", "args", "size"), NETWORKS)
def test_dense_and_packed_with_index_are_equal_bit_for_bit(
    net: str, args: str, size: int, merged: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    loaded = recipe(*(["{type: filter_merge, keep: 0.5}"] if merged else []), net=net, args=args)
    model = recipe_model(loaded)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.bias)
            nn.init.uniform_(norm.weight, -1, 1)
            nn.init.normal_(norm.running_mean)
    session = Session(loaded, 1)
    session.prepare(model)
    for layer in binary_layers(model):
        with torch.no_grad():
            if layer.threshold is not None:
                layer.threshold.normal_()
            if not merged:  # equal and opposite filters all the same
                layer.weight[1] = layer.weight[0]
                layer.weight[3] = -layer.weight[2]
        if merged:
            layer.merge.start(layer.weight, group_filters(layer.weight, 0.5, 0))
            layer.merge.gamma = 1.0
    model.eval()
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        dense = model(x)
        packed = session.convert()
        assert torch.equal(packed(x), dense)
        save_packed(packed, tmp_path / "out", loaded)
        reloaded = load_packed(tmp_path / "out")
        assert torch.equal(reloaded(x), dense)
    assert verify_packed(tmp_path / "out").identical
    layers = [m for m in reloaded.modules() if isinstance(m, PackedConv2d)]
    assert layers
    for layer, original in zip(layers, binary_layers(model), strict=True):
        c_out = layer.geometry.out_channels
        assert layer.unique_filters == (c_out // 2 if merged else c_out - 2)
        reference = torch.where(original.latent_weight() >= 0, 1.0, -1.0)
        assert torch.equal(layer.dense_weight() / layer.weight_scale, reference)


# --- rates and report ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "low", "high", "ops"), [(0.75, 12.1, 12.2, 1.57e8), (0.5, 13.3, 13.4, 1.51e8), (0.25, 14.7, 14.8, 1.44e8)]
)
def test_rates_and_operations_of_resnet18(keep: float, low: float, high: float, ops: float) -> None:
    modifiers = [f"{{type: filter_merge, keep: {keep}}}"]
    for net in ("resnet18", "bonn_resnet18"):
        text = BASE.format(net=net, args="{}", epochs=2).replace("num_classes: 10", "num_classes: 1000")
        text = text.replace("{name: digits, size: 8}", "{name: imagefolder, root: nowhere}")
        loaded = parse_recipe(text + "".join(f"  - {m}\n" for m in modifiers))
        seen = forecast(loaded, recipe_model(loaded))
        rate = seen.book.rate()
        # PReLU and the norms before the blocks give the paper's structure 4,800 real parameters more
        assert low <= (rate if net == "resnet18" else round(rate, 1)) <= high
        assert float(f"{seen.after.ops:.2e}") == ops
        assert seen.merged is not None
        assert seen.merged.total.stored == round(3840 * keep)
        index = sum(c * (math.ceil(math.log2(c * keep))) for c in [64] * 4 + [128] * 4 + [256] * 4 + [512] * 4)
        assert seen.book.bits(Role.INDEX) == index
        assert float(f"{seen.merged.macs.ops:.2e}") == 1.64e8


def test_file_bytes_follow_the_ledger(tmp_path: Path) -> None:
    sizes = {}
    for keep in (1.0, 0.5, 0.25):
        loaded = recipe(f"{{type: filter_merge, keep: {keep}}}", args="{}")
        session = Session(loaded, 1)
        session.prepare(recipe_model(loaded))
        for modifier in session.modifiers:
            modifier.foresee()
        packed = session.convert()
        save_packed(packed, tmp_path / str(keep), loaded)
        written = (tmp_path / str(keep) / "model.safetensors").stat().st_size
        header = int.from_bytes((tmp_path / str(keep) / "model.safetensors").read_bytes()[:8], "little") + 8
        assert written - header == ledger(packed).written_bytes
        sizes[keep] = ledger(packed).written_bytes
    assert sizes[0.25] < sizes[0.5] < sizes[1.0]


def test_report_tells_filters_rates_and_operations_with_and_without() -> None:
    loaded = recipe("{type: filter_merge, keep: 0.5}")
    session = Session(loaded, 1)
    session.prepare(recipe_model(loaded))
    plain = make_report("a", "b", session.convert(), recipe_model(loaded), torch.zeros(1, 3, 8, 8), 1, 1)
    assert plain.merging is None
    for modifier in session.modifiers:
        modifier.foresee()
    report = make_report("a", "b", session.convert(), recipe_model(loaded), torch.zeros(1, 3, 8, 8), 1, 1)
    assert report.merging is not None
    assert [(r.filters, r.stored) for r in report.merging.layers] == [(c, c // 2) for c in (16, 16, 32, 32, 64, 64)]
    assert report.merging.rates == plain.rates
    assert report.merging.ops == plain.operations.ops > report.operations.ops
    assert report.rates[0].rate > plain.rates[0].rate
    text = to_markdown(report)
    assert "## With and without merging filters" in text
    assert "| filters | 224 | 112 |" in text


# --- the modifier -------------------------------------------------------------------------------------------


def test_gamma_rises_over_the_window_and_stays_at_one() -> None:
    loaded = recipe("{type: filter_merge, keep: 0.5, start: 1, end: 3}", epochs=4)
    session = Session(loaded, 3)
    model = session.prepare(recipe_model(loaded))
    optimizer = torch.optim.Adam(session.param_groups())
    layer = binary_layers(model)[0]
    gammas, distances = [], []
    x = torch.randn(4, 3, 8, 8)
    while session.epoch < session.epochs:
        optimizer.zero_grad()
        logits = model(x)
        gammas.append(layer.merge.gamma)
        (logits.square().mean() + session.loss().total).backward()
        optimizer.step()
        session.step()
        if session.clock.step == 0:
            distances.append(layer.merge.distance(layer.weight))
    assert gammas == pytest.approx([0, 0, 0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])
    assert distances[1] > 0.01
    assert distances[2:] == pytest.approx([0, 0], abs=1e-6)
    metrics = session.metrics()["filter_merge"]
    assert metrics["gamma"] == 1
    assert len(metrics["within_group_distance"]) == len(binary_layers(model))
    packed = [m for m in session.convert().modules() if isinstance(m, PackedConv2d)]
    assert all(p.unique_filters <= p.geometry.out_channels // 2 for p in packed)


def test_nothing_changes_before_the_window() -> None:
    loaded = recipe("{type: filter_merge, keep: 0.5, start: 1}", epochs=2)
    session = Session(loaded, 2)
    model = session.prepare(recipe_model(loaded))
    for layer in binary_layers(model):
        assert layer.latent_weight() is layer.weight
    model(torch.randn(2, 3, 8, 8))
    assert session.loss().terms == {}
    assert session.metrics() == {}


def test_window_of_one_epoch_with_one_step_merges_at_once() -> None:
    loaded = recipe("{type: filter_merge, keep: 0.5}", epochs=1)
    session = Session(loaded, 1)
    model = session.prepare(recipe_model(loaded))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    session.loss()
    session.step()
    assert all(layer.merge.gamma == 1 for layer in binary_layers(model))


def test_pruning_loss_is_weighted_once_and_sigma_learns_with_its_own_role() -> None:
    loaded = recipe("{type: filter_merge, keep: 0.5, loss_weight: 0.125, nu: 0.25}")
    session = Session(loaded, 2)
    model = session.prepare(recipe_model(loaded))
    model(torch.randn(2, 3, 8, 8))
    value = session.loss()["pruning"]
    layers = binary_layers(model)
    total = sum(pruning_loss(v.weight, v.merge.groups, v.merge.sigma[: v.merge.group_count], 0.25) for v in layers)
    torch.testing.assert_close(value, 0.125 * total)
    value.backward()
    roles = {g["role"]: g for g in session.param_groups()}
    assert len(roles["group_sigma"]["params"]) == len(layers)
    assert roles["group_sigma"]["weight_decay"] == 0
    assert all(p.grad is not None for p in roles["group_sigma"]["params"])


def test_loss_weight_zero_adds_no_term() -> None:
    session = Session(recipe("{type: filter_merge, keep: 0.5, loss_weight: 0}"), 2)
    session.prepare(recipe_model(session.recipe))(torch.randn(2, 3, 8, 8))
    assert session.loss().terms == {}


def test_keep_by_layer_the_last_selector_counts() -> None:
    keep = r"{'re:layer[12]\.0\.conv[12]': 0.5, layer2.0.conv2: 0.25}"
    session = Session(recipe(f"{{type: filter_merge, keep: {keep}}}"), 1)
    model = session.prepare(recipe_model(session.recipe))
    for modifier in session.modifiers:
        modifier.foresee()
    counts = {n: m.unique_filters for n, m in session.convert().named_modules() if isinstance(m, PackedConv2d)}
    assert counts == {
        "layer1.0.conv1": 8, "layer1.0.conv2": 8, "layer2.0.conv1": 16, "layer2.0.conv2": 8,
        "layer3.0.conv1": 64, "layer3.0.conv2": 64,
    }  # fmt: skip
    assert binary_layers(model)[-1].merge is None


def test_sensitivity_reaches_the_wanted_share() -> None:
    session = Session(recipe("{type: filter_merge, keep: 0.5, sensitivity: true}", epochs=1), 1)
    model = session.prepare(recipe_model(session.recipe))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    session.loss()
    session.step()
    book = ledger(session.convert())
    weights = sum(e.original_bits // 32 for e in book.select([Role.BINARY_WEIGHT]))
    # equal signs may merge a few filters more
    assert book.bits(Role.BINARY_WEIGHT) / weights == pytest.approx(0.5, abs=0.02)


def test_zeroed_variant_zeroes_after_the_window_and_says_so(tmp_path: Path) -> None:
    loaded = recipe("{type: filter_merge, keep: 0.5, end: 1, others: zero}", epochs=2)
    runner = run(loaded, tmp_path, steps=2)
    runner.train(resume=False)
    outcome = runner.finish()
    assert outcome.report.accuracy.identical_logits
    assert any("not exact" in note for note in outcome.report.notes)
    for row in outcome.report.merging.layers:
        assert row.stored + row.zeroed == row.filters
        assert row.stored == row.filters // 2
    layer = binary_layers(runner.model)[0]
    with torch.no_grad():
        out = layer(torch.randn(1, 16, 8, 8))
    assert torch.equal(out.abs().sum((0, 2, 3)) > 0, layer.merge.kept)


ALL_THREE = (
    "{type: kernel_loss, lambda: 1e-4, nu: 1e-2}",
    "{type: feature_loss, theta: 1e-3, start: 1}",
    "{type: filter_merge, keep: 0.5, start: 1, end: 3}",
)


def test_all_three_at_once_and_resume_gives_the_same_bits(tmp_path: Path) -> None:
    loaded = recipe(*ALL_THREE, epochs=4)
    whole = run(loaded, tmp_path / "whole", steps=2)
    whole.train(resume=False)
    assert {"kernel", "feature", "pruning", "task"} == set(whole.metrics[2]["loss"])

    class Stop(Exception):
        pass

    class Interrupting(Quiet):
        def steps(self, batches, epoch, epochs, total):
            if epoch == 2:  # in the middle of the window
                raise Stop
            yield from batches

    halted = run(loaded, tmp_path / "halted", steps=2)
    halted.progress = Interrupting()
    with pytest.raises(Stop):
        halted.train(resume=False)
    resumed = run(loaded, tmp_path / "halted", steps=2)
    resumed.train(resume=True)
    state, other = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)
    for a, b in zip(binary_layers(whole.model), binary_layers(resumed.model), strict=True):
        assert torch.equal(a.merge.groups, b.merge.groups)
    strip = [{k: v for k, v in m.items() if k != "seconds"} for m in resumed.metrics]
    assert strip == [{k: v for k, v in m.items() if k != "seconds"} for m in whole.metrics]
    report = resumed.finish().report
    assert report.accuracy.identical_logits
    assert report.merging.layers[0].stored <= report.merging.layers[0].filters // 2


def test_plots_show_the_distance(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runner = run(recipe("{type: filter_merge, keep: 0.5, end: 2}", epochs=2), tmp_path, steps=2)
    runner.train(resume=False)
    (picture,) = write_plots(tmp_path / "training" / "metrics.jsonl", tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "none.jsonl").write_text('{"epoch": 1}\n')
    assert write_plots(tmp_path / "none.jsonl", tmp_path) == []
    with pytest.raises(BonnError, match="can't be read"):
        write_plots(tmp_path / "missing.jsonl", tmp_path)


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{type: filter_merge, keep: 0}", "keep must be greater than 0"),
        ("{type: filter_merge, keep: 1.5}", "keep must be less than or equal to 1"),
        ("{type: filter_merge, keep: half}", "keep must be a valid number"),
        ("{type: filter_merge, keep: {layer1: 2}}", "keep.layer1 must be less than or equal to 1"),
        ("{type: filter_merge}", "missing key 'keep'"),
        ("{type: filter_merge, keep: {}}", "keep is an empty mapping"),
        ("{type: filter_merge, keep: {'re:(': 0.5}}", "is not a regular expression"),
        ("{type: filter_merge, keep: {layer1: 0.5}, sensitivity: true}", "keep must be one number"),
        ("{type: filter_merge, keep: 0.5, end: 4}", "end 4 lies after the training, which has 3 epochs"),
        ("{type: filter_merge, keep: 0.5, start: 2, end: 2}", "needs at least 1"),
        ("{type: filter_merge, keep: 0.5, others: zero}", "needs epochs after the window"),
        ("{type: filter_merge, kepe: 0.5}", "Did you mean 'keep'"),
    ],
)
def test_a_mistake_in_the_recipe_is_one_line_with_its_place(entry: str, message: str) -> None:
    with pytest.raises(BonnError) as caught:
        recipe(entry)
    lines = [line for line in str(caught.value).splitlines() if message in line]
    assert len(lines) == 1
    assert lines[0].startswith("recipe:9:")
    if "missing" not in message and "kepe" not in entry:
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{type: filter_merge, keep: 0.02}", "keep 0.02 leaves none of the 16 filters of layer1.0.conv1"),
        ("{type: filter_merge, keep: {layer1.0.conv1: 0.02}}", "it must be at least 0.0625 there"),
        ("{type: filter_merge, keep: {layer9.0.conv1: 0.5}}", "matches no convolution"),
        ("{type: filter_merge, keep: {conv1: 0.5}}", "conv1 is not binarised"),
    ],
)
def test_a_recipe_that_does_not_fit_the_model_is_one_line_with_its_place(entry: str, message: str) -> None:
    loaded = recipe(entry)
    with pytest.raises(ModelError) as caught:
        Session(loaded, 1).prepare(recipe_model(loaded))
    assert message in str(caught.value)
    assert str(caught.value).startswith("recipe:9:")
    assert "\n" not in str(caught.value)


def test_filter_merge_needs_binarize() -> None:
    text = BASE.format(net="bonn_wrn22_16", args="{}", epochs=2).replace("binarize}", "filter_merge, keep: 0.5}")
    with pytest.raises(BonnError, match="needs a binarize before it"):
        parse_recipe(text)


def test_two_merges_of_one_layer_are_refused_of_two_layers_not() -> None:
    entries = ["{type: filter_merge, keep: {layer1.0.conv1: 0.5}}", "{type: filter_merge, keep: {layer1.0.conv2: 0.5}}"]
    session = Session(recipe(*entries, epochs=1), 1)
    model = session.prepare(recipe_model(session.recipe))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    session.loss()
    session.step()
    assert set(session.metrics()) == {"filter_merge", "filter_merge.2"}
    loaded = recipe(entries[0], entries[0])
    with pytest.raises(ModelError, match="merged by an earlier filter_merge already"):
        Session(loaded, 1).prepare(recipe_model(loaded))


def test_grouped_convolutions_are_refused_where_named_and_left_alone_by_default() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
            self.c = nn.Conv2d(8, 8, 3, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x))).mean((2, 3))

    model = Session(recipe("{type: filter_merge, keep: 0.5}"), 1).prepare(Grouped(), torch.randn(1, 3, 8, 8))
    assert model.b.merge is not None
    assert model.c.merge is None
    with pytest.raises(ModelError, match="grouped"):
        Session(recipe("{type: filter_merge, keep: {c: 0.5}}"), 1).prepare(Grouped(), torch.randn(1, 3, 8, 8))


def test_merge_module_before_its_start_is_the_identity() -> None:
    merge = FilterMerge(4, 2, 1e-3)
    weight = torch.randn(4, 2, 3, 3)
    assert merge(weight) is weight
    assert merge.gate(weight) is weight
    assert torch.equal(group_mean(weight, merge.groups), weight)


def test_shipped_recipes_with_merging_pass_check() -> None:
    from bonn_plugin.cli import app

    result = CliRunner().invoke(app, ["check", "digits_wrn22_16_merged", "--set", "modifiers.filter_merge.keep=0.25"])
    assert result.exit_code == 0
    assert "merged to" in result.output


def test_packing_round_trip_of_one_row_flags() -> None:
    flags = torch.tensor([1.0, -1, 1, 1, -1, 1, -1, -1, 1])
    assert torch.equal(unpack_signs(pack_signs(flags[None]), (1, 9))[0], flags)
