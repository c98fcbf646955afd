"""integrations/lightning: the callback trains as a loop with a ``Session`` does, and refuses what it can't do."""

import importlib.util
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bonn_plugin import BonnError, Session, load_packed, parse_recipe, verify_packed
from bonn_plugin.modifiers import Modifier
from bonn_plugin.nn import BinaryConv2d

pytest.importorskip("lightning")
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint

FOLDER = Path(__file__).parent.parent / "integrations" / "lightning"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]

RECIPE = """version: 1
name: small
model: {name: bonn_wrn22_16, num_classes: 4, args: {depth: 10, widths: [8, 8, 8]}}
data: {name: imagefolder, root: ., crop: 8}
training: {epochs: 2, batch_size: 8, optimizer: {name: sgd, lr: 1e-2}}
modifiers:
  - {type: binarize}
  - {type: kernel_loss, lambda: 1e-2, nu: 1e-3}
"""
FEATURES = RECIPE.replace("epochs: 2", "epochs: 3") + "  - {type: feature_loss, theta: 1e-3}\n"
BATCHES = 5


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def callback(monkeypatch):
    module = load("bonn_callback")
    monkeypatch.setitem(sys.modules, "bonn_callback", module)
    return module.BonnCallback


def network(recipe):
    torch.manual_seed(0)
    return timm.create_model(recipe.model.name, num_classes=4, **recipe.model.args)


class Plain(LightningModule):
    """What a user has already."""

    def __init__(self, recipe, form="tensor"):
        super().__init__()
        self.model = network(recipe)
        self.form = form

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.model(x), y)
        return {"tensor": loss, "mapping": {"loss": loss, "kept": 1}, "none": None}[self.form]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)


class Grouped(Plain):
    """Rates by role, from the session."""

    callback = None

    def configure_optimizers(self):
        return torch.optim.SGD(self.callback.session.param_groups(), lr=1e-2, momentum=0.9)


def data():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8 * BATCHES, 3, 8, 8, generator=generator)
    return TensorDataset(images, torch.randint(4, (8 * BATCHES,), generator=generator))


def loader():
    return DataLoader(data(), 8)


def trainer(*callbacks, epochs=2, **settings):
    return Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **settings,
        },
    )


def by_hand(recipe, accumulate=1):
    """The same training in a loop of one's own."""
    model = network(recipe)
    session = Session(recipe, -(-BATCHES // accumulate))
    session.prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    for _ in range(recipe.training.epochs):
        optimizer.zero_grad()
        for i, (x, y) in enumerate(loader()):
            loss = nn.functional.cross_entropy(model(x), y) + session.loss(labels=y).total
            (loss / accumulate).backward()
            if (i + 1) % accumulate == 0 or i + 1 == BATCHES:
                optimizer.step()
                session.step()
                optimizer.zero_grad()
    return session


@pytest.mark.parametrize("form", ["tensor", "mapping"])
def test_the_callback_trains_as_a_loop_with_a_session_does(callback, form, tmp_path):
    recipe = parse_recipe(RECIPE)
    bonn = callback(recipe, tmp_path)
    module = Plain(recipe, form)
    trainer(bonn).fit(module, loader())
    assert BinaryConv2d.names_in(module.model)
    expected = by_hand(recipe)
    for (name, ours), theirs in zip(module.model.state_dict().items(), expected.model.state_dict().values()):
        assert torch.equal(ours, theirs), name
    assert bonn.session.epoch == 2
    assert verify_packed(tmp_path).identical
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(load_packed(tmp_path)(x), expected.convert()(x))


def test_the_callback_counts_the_optimizers_steps_where_gradients_accumulate(callback, tmp_path):
    recipe = parse_recipe(RECIPE)
    bonn = callback(recipe, tmp_path)
    module = Plain(recipe)
    trainer(bonn, accumulate_grad_batches=2).fit(module, loader())
    assert bonn.session.clock.steps_per_epoch == 3
    assert bonn.session.epoch == 2
    for (name, ours), theirs in zip(module.model.state_dict().items(), by_hand(recipe, 2).model.state_dict().values()):
        assert torch.allclose(ours, theirs, atol=1e-6), name


def test_a_training_that_goes_on_from_a_checkpoint_ends_with_the_same_weights(callback, tmp_path):
    recipe = parse_recipe(RECIPE)
    keep = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, filename="{epoch}")
    whole = Plain(recipe)
    trainer(callback(recipe, tmp_path / "a"), keep, enable_checkpointing=True).fit(whole, loader())
    again, bonn = Plain(recipe), callback(recipe, tmp_path / "b")
    trainer(bonn).fit(again, loader(), ckpt_path=tmp_path / "kept" / "epoch=0.ckpt")
    assert bonn.session.epoch == 2
    for (name, ours), theirs in zip(again.state_dict().items(), whole.state_dict().values()):
        assert torch.equal(ours, theirs), name
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_feature_loss_needs_the_sessions_parameter_groups_and_says_so(callback, tmp_path):
    recipe = parse_recipe(FEATURES)
    with pytest.raises(BonnError, match=r"role 'feature_sigma' are not in the optimizer.*param_groups\(\)"):
        trainer(callback(recipe, tmp_path), epochs=3).fit(Plain(recipe), loader())
    module = Grouped(recipe)
    module.callback = callback(recipe, tmp_path)
    trainer(module.callback, epochs=3).fit(module, loader())
    assert verify_packed(tmp_path).identical


def test_the_module_has_its_own_training_step_back_afterwards(callback, tmp_path):
    recipe = parse_recipe(RECIPE)
    module = Plain(recipe)
    trainer(callback(recipe, tmp_path)).fit(module, loader())
    assert module.training_step.__func__ is Plain.training_step


def test_the_losses_are_logged(callback, tmp_path):
    recipe = parse_recipe(RECIPE)
    made = trainer(callback(recipe, tmp_path))
    made.fit(Plain(recipe), loader())
    assert float(made.callback_metrics["bonn/kernel"]) > 0


def test_passes_at_convert_see_the_training_images_in_the_order_of_the_data_set(callback, tmp_path):
    recipe = parse_recipe(RECIPE)
    seen = []

    class Looks(Modifier):
        def convert(self, model, context):
            seen.extend([torch.cat(list(context.calibration())) for _ in range(2)])

    bonn = callback(recipe, tmp_path)
    module = Plain(recipe)
    made = trainer(bonn, LambdaCallback(on_train_start=lambda *_: add(bonn.session, Looks)))
    made.fit(module, DataLoader(data(), 8, shuffle=True))
    assert all(torch.equal(images, data().tensors[0]) for images in seen)
    assert len(seen) == 2


def add(session, modifier):
    session.modifiers = (*session.modifiers, modifier(session.recipe.modifiers[0], session.clock))


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"epochs": 3}, {}, "the recipe has 2 epochs, the trainer 3"),
        ({}, {"network": "net"}, "Plain has no network 'net'; its modules are: model"),
        ({}, {"network": ""}, "Plain has no network ''; its modules are: model"),
        ({"form": "none"}, {}, "training_step returned NoneType: no loss"),
        ({"manual": True}, {}, "needs automatic optimization"),
        ({}, {"unpack": None}, "a batch is a list, no pair"),
    ],
)
def test_what_the_callback_can_not_do_is_refused_with_the_reason(callback, change, settings, message, tmp_path):
    recipe = parse_recipe(RECIPE)
    module = Plain(recipe, change.get("form", "tensor"))
    module.automatic_optimization = not change.get("manual", False)
    batches = loader()
    if "unpack" in settings:
        settings = {}
        batches = DataLoader(TensorDataset(*data().tensors, torch.zeros(8 * BATCHES)), 8)
        module.training_step = lambda batch, batch_idx: nn.functional.cross_entropy(module.model(batch[0]), batch[1])
    with pytest.raises(BonnError, match=message):
        trainer(callback(recipe, tmp_path, **settings), epochs=change.get("epochs", 2)).fit(module, batches)
    assert not (tmp_path / "config.json").exists()


def test_the_session_is_asked_for_too_early(callback, tmp_path):
    with pytest.raises(BonnError, match=r"only from Trainer\.fit on"):
        _ = callback(parse_recipe(RECIPE), tmp_path).session


def test_the_script_trains_digits(callback, monkeypatch, tmp_path, capsys):
    script = load("train")
    settings = ["training.epochs=2", "modifiers.kernel_loss.start=1", "model.args.widths=[8, 8, 8]"]
    args = [part for setting in settings for part in ("--set", setting)]
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path / "out"), *args])
    script.main()
    assert f"{tmp_path / 'out'}: packed, top-1 " in capsys.readouterr().out
    assert verify_packed(tmp_path / "out").identical


def test_a_mistake_in_the_scripts_recipe_is_told_in_one_line(callback, monkeypatch, tmp_path, capsys):
    script = load("train")
    monkeypatch.setattr(sys, "argv", ["train.py", "--set", "training.epoch=2"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2
    assert "unknown key 'epoch'" in capsys.readouterr().err
