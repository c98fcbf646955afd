"""The session in a user's own training loop, and what it says when it is misused."""

import math

import pytest
import timm
import torch
from torch import nn

from bonn_plugin import Session, load_recipe, parse_recipe, register_modifier, save_packed
from bonn_plugin.checkpoint import load_packed
from bonn_plugin.errors import ModelError, SessionError
from bonn_plugin.modifiers import Modifier, WindowConfig
from bonn_plugin.nn import BinaryConv2d, PackedConv2d
from bonn_plugin.recipe import recipe_model
from tests import reference
from tests.conftest import TINY


def own_loop(recipe, epochs=None, session=None, steps=3):
    """The ten lines of the README, on noise."""
    torch.manual_seed(0)
    session = session or Session(recipe, steps)
    model = session.prepare(recipe_model(recipe))
    optimizer = torch.optim.SGD(session.param_groups(), lr=0.01, momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    terms = []
    for _ in range(session.epochs if epochs is None else epochs):
        for _ in range(steps):
            x, y = torch.randn(8, 3, 8, 8), torch.arange(8)
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            extra = session.loss(labels=y)
            terms.append({name: float(value.detach()) for name, value in extra.terms.items()})
            (loss + extra.total).backward()
            optimizer.step()
            session.step()
    return session, model, terms


def test_a_users_own_loop_trains_packs_and_reloads(tiny, tmp_path):
    session, model, _ = own_loop(tiny)
    folder = save_packed(session.convert(), tmp_path / "out", session.recipe)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(load_packed(folder)(x), model.eval()(x))
    assert BinaryConv2d.names_in(model), "the trained model stays as it is"


def test_the_kernel_term_is_lambda_times_the_sum_of_the_layers_losses(tiny):
    session = Session(tiny, 1)
    model = session.prepare(recipe_model(tiny))
    term = session.loss()["kernel"]
    wanted = 0.0
    for module in model.modules():
        if isinstance(module, BinaryConv2d):
            prior = module.prior
            args = (t.detach() for t in (module.weight, module.modulation, prior.mu, prior.sigma))
            wanted += 1e-3 * reference.eq9_kernel(*args, 1e-3)
    assert float(term.detach()) == pytest.approx(wanted, rel=1e-4)


def test_w_stays_positive_at_any_learning_rate(tiny):
    session = Session(tiny, 6)
    model = session.prepare(recipe_model(tiny))
    layers = [m for m in model.modules() if isinstance(m, BinaryConv2d)]
    optimizer = torch.optim.Adam([{**group, "lr": 0.1} for group in session.param_groups()])  # steps as long as w
    torch.manual_seed(0)
    passed = 0
    for _ in range(6):
        y = torch.arange(8)
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(torch.randn(8, 3, 8, 8)), y) + session.loss(labels=y).total).backward()
        optimizer.step()
        passed += sum(int((m.modulation < 0).sum()) for m in layers)
        session.step()
        assert all(bool((m.modulation > 0).all()) for m in layers)
    assert passed > 100, "the optimizer alone takes it below zero"


def test_windows_are_whole_epochs_and_half_open():
    recipe = parse_recipe(TINY.replace("nu: 1e-3", "nu: 1e-3, start: 1, end: 2"))
    _, _, terms = own_loop(recipe)
    assert ["kernel" in t for t in terms] == [False] * 3 + [True] * 3 + [False] * 3


def test_the_feature_loss_gathers_one_epoch_and_then_acts():
    recipe = parse_recipe(TINY + "  - {type: feature_loss, theta: 1e-2, start: 1}\n")
    session, _, terms = own_loop(recipe)
    assert ["feature" in t for t in terms] == [False] * 6 + [True] * 3
    clusters = session.modifiers[2].clusters
    assert clusters.count.sum() == 3 * 8
    assert not torch.equal(clusters.centers, clusters.mean), "the centres move by their own rule"
    assert all(math.isfinite(value) for t in terms for value in t.values())


def test_a_loss_that_was_never_added_is_an_error_with_the_line_to_add(tiny):
    session = Session(tiny, 3)
    model = session.prepare(recipe_model(tiny))
    model(torch.randn(2, 3, 8, 8))
    with pytest.raises(SessionError, match=r"session\.loss\(labels=y\)\.total"):
        session.step()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda s, m: s.loss(), "prepare"),
        (lambda s, m: s.convert(), "prepare"),
        (lambda s, m: (s.prepare(m), s.prepare(m)), "one session serves one model"),
        (lambda s, m: Session(s.recipe, 0), "smaller than one batch"),
    ],
)
def test_calls_out_of_order_are_refused(tiny, act, message):
    with pytest.raises(SessionError, match=message):
        act(Session(tiny, 3), recipe_model(tiny))


def test_steps_after_the_last_epoch_are_refused(tiny):
    session, _, _ = own_loop(tiny)
    with pytest.raises(SessionError, match="over"):
        session.step()
    with pytest.raises(SessionError, match="over"):
        session.loss()


def test_the_feature_loss_says_what_it_misses():
    recipe = parse_recipe(TINY + "  - {type: feature_loss, theta: 1e-2}\n")
    session = Session(recipe, 3)
    model = session.prepare(recipe_model(recipe))
    with pytest.raises(SessionError, match="no forward pass"):
        session.loss(labels=torch.zeros(2, dtype=torch.long))
    model(torch.randn(2, 3, 8, 8))
    with pytest.raises(SessionError, match="labels=y"):
        session.loss()


def test_binarising_twice_is_an_error_with_its_place():
    text = TINY.replace("- {type: binarize}", "- {type: binarize}\n  - {type: binarize, targets: [layer1.0.conv1]}")
    recipe = parse_recipe(text, "twice.yaml")
    with pytest.raises(ModelError, match=r"twice\.yaml:\d+:\d+: layer1\.0\.conv1 is binarised already"):
        Session(recipe, 1).prepare(recipe_model(recipe))


def test_two_binarisers_with_other_settings_share_a_model():
    text = TINY.replace(
        "- {type: binarize}",
        "- {type: binarize, targets: [layer1.0.conv1], ste: polynomial}\n"
        "  - {type: binarize, targets: [layer1.0.conv2], bound: 1.5}",
    )
    recipe = parse_recipe(text)
    model = Session(recipe, 1).prepare(recipe_model(recipe))
    assert (model.layer1[0].conv1.ste, model.layer1[0].conv2.bound) == ("polynomial", 1.5)
    assert isinstance(model.layer2[0].conv1, nn.Conv2d)


def test_parameter_groups_have_the_roles_and_no_decay_where_none_belongs():
    text = TINY.replace("lr: 1e-2", "lr: 1e-2, weight_decay: 0.1, lr_by_role: {modulation: 1e-3, sigma: 2e-3}")
    recipe = parse_recipe(text + "  - {type: feature_loss, theta: 1e-2}\n")
    session = Session(recipe, 1)
    model = session.prepare(recipe_model(recipe))
    groups = session.param_groups()
    by_role = {}
    for group in groups:
        by_role.setdefault(group["role"], []).append(group)
    assert set(by_role) == {"weight", "modulation", "mu", "sigma", "feature_sigma", "rest"}
    assert {role: {g["weight_decay"] for g in own} for role, own in by_role.items()} == {
        "weight": {0.1},
        "modulation": {0.0},
        "mu": {0.0},
        "sigma": {0.0},
        "feature_sigma": {0.0},
        "rest": {0.1, 0.0},
    }
    assert by_role["modulation"][0]["lr"] == 1e-3
    assert by_role["sigma"][0]["lr"] == 2e-3
    given = {id(p) for g in groups for p in g["params"]}
    own = {id(p) for p in [*model.parameters(), *session.modifiers[2].clusters.parameters()]}
    assert given == own
    assert sum(len(g["params"]) for g in groups) == len(own)
    undecayed = {id(p) for g in by_role["rest"] if not g["weight_decay"] for p in g["params"]}
    assert id(model.bn.weight) in undecayed
    assert id(model.fc.bias) in undecayed


def test_a_state_goes_on_in_another_session_and_refuses_another_recipe(tiny):
    session, _, _ = own_loop(tiny, epochs=1)
    state = session.state_dict()
    other = Session(tiny, 3)
    other.prepare(recipe_model(tiny))
    other.load_state_dict(state)
    assert other.epoch == 1
    changed = Session(parse_recipe(TINY.replace("nu: 1e-3", "nu: 2e-3")), 3)
    changed.prepare(recipe_model(tiny))
    with pytest.raises(SessionError, match="another recipe"):
        changed.load_state_dict(state)
    longer = Session(tiny, 4)
    longer.prepare(recipe_model(tiny))
    with pytest.raises(SessionError, match="data set has changed"):
        longer.load_state_dict(state)


def test_a_relu_before_a_binarised_convolution_gets_a_learned_threshold():
    text = TINY.replace(
        "{name: bonn_wrn22_16, num_classes: 10, args: {depth: 10, widths: [8, 8, 16]}}",
        "{name: resnet10t, num_classes: 10}",
    ).replace("size: 8", "size: 32")
    recipe = parse_recipe(text)
    model = Session(recipe, 1).prepare(recipe_model(recipe))
    first, second = model.layer1[0].conv1, model.layer1[0].conv2
    assert first.threshold is not None
    assert second.threshold is not None
    never = parse_recipe(text.replace("{type: binarize}", "{type: binarize, threshold: never}"))
    plain = Session(never, 1).prepare(recipe_model(never))
    assert plain.layer1[0].conv1.threshold is None


def test_own_networks_need_no_threshold(tiny):
    model = Session(tiny, 1).prepare(recipe_model(tiny))
    assert all(m.threshold is None for m in model.modules() if isinstance(m, BinaryConv2d))


class CountConfig(WindowConfig):
    type: str = "count_steps"


CALLS: list[str] = []


@register_modifier("count_steps", CountConfig)
class CountSteps(Modifier[CountConfig]):
    def on_train_begin(self):
        CALLS.append("train_begin")

    def on_epoch_begin(self):
        CALLS.append(f"epoch_begin {self.clock.epoch}")

    def on_step_begin(self):
        CALLS.append("step_begin")

    def on_after_optimizer_step(self):
        CALLS.append("after_step")

    def on_epoch_end(self):
        CALLS.append(f"epoch_end {self.clock.epoch}")

    def on_train_end(self):
        CALLS.append("train_end")


def test_a_third_partys_modifier_lives_through_the_lifecycle():
    CALLS.clear()
    recipe = parse_recipe(TINY.replace("epochs: 3", "epochs: 2") + "  - {type: count_steps}\n")
    own_loop(recipe, steps=2)
    step = ["step_begin", "after_step"]
    assert [
        "train_begin",
        *("epoch_begin 0", *step, *step, "epoch_end 0"),
        *("epoch_begin 1", *step, *step, "epoch_end 1"),
        "train_end",
    ] == CALLS


class GradConfig(WindowConfig):
    type: str = "needs_gradients"


@register_modifier("needs_gradients", GradConfig)
class NeedsGradients(Modifier[GradConfig]):
    def on_before_optimizer_step(self):
        CALLS.append("before")


def test_a_modifier_that_works_on_gradients_must_be_given_the_chance():
    recipe = parse_recipe(TINY + "  - {type: needs_gradients}\n")
    session = Session(recipe, 2)
    model = session.prepare(recipe_model(recipe))
    model(torch.randn(2, 3, 8, 8))
    session.loss()
    with pytest.raises(SessionError, match=r"session\.before_step\(\)"):
        session.step()
    session.before_step()
    session.step()


def test_a_modifier_type_is_registered_once():
    with pytest.raises(ValueError, match="registered already"):
        register_modifier("binarize", CountConfig)(CountSteps)


def test_the_copy_that_is_packed_carries_no_hooks():
    recipe = parse_recipe(TINY + "  - {type: feature_loss, theta: 1e-2}\n")
    session, model, _ = own_loop(recipe, epochs=1)
    packed = session.convert()
    assert any(isinstance(m, PackedConv2d) for m in packed.modules())
    for module in packed.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    model.train()
    model(torch.randn(2, 3, 8, 8))
    session.loss(labels=torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("name", ["digits_wrn22_16", "imagenet_resnet18"])
def test_shipped_recipes_prepare_their_networks(name):
    from bonn_plugin.shipped import find_recipe

    recipe = load_recipe(find_recipe(name), ["data.crop=64"] if "imagenet" in name else [])
    model = Session(recipe, 1).prepare(timm.create_model(recipe.model.name, num_classes=recipe.model.num_classes))
    assert BinaryConv2d.names_in(model)
