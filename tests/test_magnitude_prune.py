"""``magnitude_prune``: masks over a window, stored sparse where that is smaller."""

import pytest
import torch
from torch import nn
from torch.ao.pruning import CubicSL

from bonn_plugin import Session, ledger, load_packed, parse_recipe, save_packed, verify_packed
from bonn_plugin.checkpoint import load_state, load_weights
from bonn_plugin.errors import ModelError
from bonn_plugin.modifiers import MagnitudePruneConfig
from bonn_plugin.nn import Role, SparseConv2d, SparseLinear
from bonn_plugin.nn.sparse import smaller_sparse
from bonn_plugin.recipe import RecipeError, recipe_model
from bonn_plugin.train import STATE, Quiet, Runner
from tests.conftest import TINY

LINE = "  - {type: magnitude_prune, OPTIONS}\n"


def recipe(options="sparsity: 0.75", more=""):
    return parse_recipe(TINY + LINE.replace("OPTIONS", options) + more, "tiny.yaml")


def prepared(settings, steps=1):
    torch.manual_seed(0)
    session = Session(settings, steps)
    session.prepare(recipe_model(settings))
    return session


def go(session, epochs):
    optimizer = torch.optim.Adam(session.param_groups())
    for _ in range(epochs):
        optimizer.zero_grad()
        out = session.model.train()(torch.randn(4, 3, 8, 8))
        (out.square().mean() + session.loss().total).backward()
        optimizer.step()
        session.step()


def share_of_zeros(layer):
    return float((layer.weight == 0).float().mean())


def test_the_share_follows_the_cubic_schedule_of_torch():
    config = MagnitudePruneConfig(sparsity=0.8, start=2, end=7)
    assert [config.sparsity_at(e, 10) for e in (0, 1)] == [0, 0]
    for t in range(1, 6):
        want = CubicSL.sparsity_compute_fn(0.0, 0.8, t, 0, 1, 5)
        assert config.sparsity_at(1 + t, 10) == pytest.approx(want)
    assert config.sparsity_at(6, 10) == config.sparsity_at(9, 10) == 0.8
    once = MagnitudePruneConfig(sparsity=0.8, start=2, end=7, schedule="once")
    assert [once.sparsity_at(e, 10) for e in (1, 2, 3)] == [0, 0.8, 0.8]


def test_the_smallest_weights_become_zero_and_stay_so():
    session = prepared(recipe("sparsity: 0.75, targets: [fc], schedule: once, start: 1"))
    fc = session.model.fc
    go(session, 1)
    before = fc.weight.detach().clone()
    assert share_of_zeros(fc) == 0
    session.model.train()(torch.randn(4, 3, 8, 8))
    zeros = (fc.weight == 0).flatten().nonzero().flatten().tolist()
    smallest = sorted(range(before.numel()), key=lambda i: abs(before.flatten()[i].item()))[
        : round(0.75 * before.numel())
    ]
    assert sorted(zeros) == sorted(smallest)
    go(session, 2)
    assert (fc.weight == 0).flatten().nonzero().flatten().tolist() == zeros


def test_the_masks_move_within_the_window_and_the_metrics_tell():
    session = prepared(recipe("sparsity: 0.6, end: 2"), steps=2)
    shares = []
    for _ in range(6):
        go(session, 1)
        shares.append(session.metrics()["magnitude_prune"]["sparsity"])
    first = 0.6 * (1 - 0.5**3)
    assert shares == pytest.approx([first, first, 0.6, 0.6, 0.6, 0.6], abs=2e-3)


def test_what_is_sparse_is_stored_so_and_computes_the_same(tmp_path):
    settings = recipe("sparsity: 0.75, schedule: once")
    session = prepared(settings)
    go(session, 3)
    packed = session.convert()
    model = session.model.eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))
        save_packed(packed, tmp_path / "out", settings)
        again = load_packed(tmp_path / "out")
        assert torch.equal(again(x), model(x))
    assert verify_packed(tmp_path / "out").identical
    assert isinstance(again.fc, SparseLinear)
    assert isinstance(again.conv1, SparseConv2d)
    assert torch.equal(again.fc.dense_weight(), model.fc.weight)
    entries = {e.name: e for e in ledger(again).entries}
    n = model.fc.weight.numel()
    values = n - round(0.75 * n)
    assert (entries["fc.weight_mask"].role, entries["fc.weight_mask"].needed_bits) == (Role.MASK, n)
    assert entries["fc.weight_values"].needed_bits == 32 * values
    assert entries["fc.weight_values"].original_bits == 32 * n
    dense = ledger(prepared(parse_recipe(TINY)).convert())
    assert sum(e.original_bits for e in ledger(again).entries) == sum(e.original_bits for e in dense.entries)
    assert ledger(again).rate() > dense.rate()
    assert "parametrizations" not in str(list(entries))
    assert load_weights(tmp_path / "out")["fc.weight"].shape == model.fc.weight.shape


def test_what_would_not_be_smaller_stays_dense_and_is_counted_so(tmp_path):
    settings = recipe("sparsity: 0.02, targets: [fc], schedule: once")
    session = prepared(settings)
    go(session, 3)
    packed = session.convert()
    assert type(packed.fc) is nn.Linear
    assert share_of_zeros(packed.fc) > 0
    assert not smaller_sparse(packed.fc.weight)
    assert {e.name: e for e in ledger(packed).entries}["fc.weight"].needed_bits == 32 * packed.fc.weight.numel()
    same, less = torch.ones(32), torch.ones(64)
    same[0], less[:3] = 0, 0
    assert not smaller_sparse(same)
    assert smaller_sparse(less)


def test_a_resumed_run_ends_with_the_same_masks_and_another_run_can_start_from_it(tmp_path):
    settings = recipe("sparsity: 0.7")
    whole = Runner(settings, tmp_path / "whole", torch.device("cpu"), Quiet())
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
    weights = load_weights(tmp_path / "whole")
    assert float((weights["fc.weight"] == 0).float().mean()) == pytest.approx(0.7, abs=0.01)
    start = parse_recipe(TINY.replace("num_classes: 10,", f"num_classes: 10, init_from: '{tmp_path}/whole',"))
    runner = Runner(start, tmp_path / "next", torch.device("cpu"), Quiet())
    assert torch.equal(runner.model.fc.weight, weights["fc.weight"])


def test_check_foresees_the_sparse_form():
    from bonn_plugin.check import forecast

    settings = recipe("sparsity: 0.9")
    rate = forecast(settings, recipe_model(settings)).book.rate()
    without = parse_recipe(TINY)
    assert rate > 1.2 * forecast(without, recipe_model(without)).book.rate()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            "sparsity: 0.9, targets: [fd]",
            "'fd' matches none: no convolution or linear layer in full precision. Did you mean",
        ),
        ("sparsity: 0.9, targets: [layer1.0.conv1]", "layer1.0.conv1 is a BinaryConv2d: no convolution or linear"),
        ("sparsity: 0.9999, targets: [fc]", "sparsity 0.9999 leaves no weight of fc"),
    ],
)
def test_what_does_not_fit_is_one_line_with_its_place(options, said):
    with pytest.raises(ModelError, match=said) as caught:
        prepared(recipe(options))
    assert str(caught.value).startswith("tiny.yaml:13:")


def test_a_layer_is_masked_once():
    with pytest.raises(ModelError, match="the weights of conv1 are masked already"):
        prepared(recipe(more=LINE.replace("OPTIONS", "sparsity: 0.5")))


@pytest.mark.parametrize("options", ["sparsity: 1", "sparsity: 0.5, targets: ['re:(']", "sparsity: 0.5, end: 9"])
def test_settings_out_of_range_are_told(options):
    with pytest.raises(RecipeError, match=r"tiny\.yaml:13:"):
        recipe(options)


def test_a_broken_specification_is_refused():
    with pytest.raises(ValueError, match="values is None"):
        SparseLinear.from_spec({"out_features": 2, "in_features": 3})
    with pytest.raises(ValueError, match="7 values do not fit"):
        SparseLinear.from_spec({"out_features": 2, "in_features": 3, "values": 7})
