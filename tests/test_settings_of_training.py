"""Settings of the training that must not change what they are not about, and bad steps and samples that are skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bonn_plugin import load_packed, parse_recipe
from bonn_plugin.checkpoint import load_state
from bonn_plugin.errors import CheckpointError, DataError, TrainingError
from bonn_plugin.files import write_file
from bonn_plugin.nn.synced_norm import SyncedBatchNorm2d, restore_norms, synchronise_norms
from bonn_plugin.recipe import recipe_model
from bonn_plugin.train import BAD_STEP, STATE, Runner
from bonn_plugin.train import runner as runner_module
from bonn_plugin.train.stepper import Stepper, Taken
from tests.conftest import TINY, randomize_norms
from tests.test_resume import Silent, assert_same

ALL_LOSSES = """
  - {type: feature_loss, theta: 1e-2}
  - {type: filter_merge, keep: 0.5, start: 0, end: 2, loss_weight: 1e-3}
"""


def make(folder: Path | None, *settings: str, text: str = TINY + ALL_LOSSES.lstrip("\n")) -> Runner:
    return Runner(parse_recipe(text, "t.yaml", settings), folder, torch.device("cpu"), Silent())  # type: ignore[arg-type]


def frozen_norms(runner: Runner) -> None:
    """Let norms use fixed statistics: their batch is what ``accumulate`` changes by what it means."""
    randomize_norms(runner.model)
    for module in runner.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign, misc]


def gradients(runner: Runner, parts: list[Any]) -> dict[str, Tensor]:
    frozen_norms(runner)
    runner.model.train()
    runner.stepper._gradients(parts)
    own = [(f"own{i}", p) for i, m in enumerate(runner.session.own_modules()) for p in m.parameters()]
    return {name: p.grad for name, p in [*runner.model.named_parameters(), *own] if p.grad is not None}


def batch_of(runner: Runner) -> list[Tensor]:
    return next(iter(runner.task.loader))  # type: ignore[no-any-return]


# --- accumulate ----------------------------------------------------------------------------------


def test_micro_batches_give_the_gradient_of_the_whole_batch() -> None:
    images, labels = batch_of(make(None))
    plain = gradients(make(None), [[images, labels]])
    parts = list(zip(images.chunk(4), labels.chunk(4), strict=True))
    cut = gradients(make(None), parts)
    assert plain.keys() == cut.keys()
    assert "layer1.0.conv1.prior.mu" in plain
    for name, grad in plain.items():
        assert torch.allclose(grad, cut[name], rtol=1e-4, atol=1e-6), name


def test_a_step_of_micro_batches_is_one_step_of_the_clock_and_moves_the_centres_once(tmp_path: Path) -> None:
    whole, cut = make(None), make(None, "training.accumulate=4")
    assert cut.steps == whole.steps == 10
    assert len(cut.task.loader) == 40
    for runner in (whole, cut):
        frozen_norms(runner)
        for epoch in range(2):
            runner._epoch(epoch)
    assert cut.session.epoch == 2
    centres = [runner.session.modifiers[2].modules()["clusters"].centers for runner in (whole, cut)]  # type: ignore[union-attr]
    assert float(centres[0].norm()) > 0
    assert torch.allclose(centres[0], centres[1], rtol=0.2, atol=0.1)  # signs flip where sums are taken another way


def test_a_batch_that_micro_batches_do_not_divide_is_told() -> None:
    with pytest.raises(Exception, match=r"training.accumulate=3: a batch_size of 128 can't be cut into 3 equal parts"):
        make(None, "training.accumulate=3")


# --- precision, memory format, compilation -------------------------------------------------------


def test_channels_last_changes_the_gradient_by_rounding_alone(tmp_path: Path) -> None:
    plain, other = make(None), make(tmp_path, "training.channels_last=true")
    assert other.model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    images, labels = batch_of(plain)
    one, two = gradients(plain, [[images, labels]]), gradients(other, [[images, labels]])
    for name, grad in one.items():
        assert torch.allclose(grad, two[name], rtol=1e-3, atol=1e-5), name


def test_channels_last_packs_what_it_trained(tmp_path: Path) -> None:
    runner = make(tmp_path, "training.channels_last=true", "training.epochs=2")
    runner.train(resume=False)
    assert runner.finish().report.accuracy.identical_logits


def test_compile_changes_neither_losses_nor_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: own(module, backend="eager"))
    plain, compiled = make(tmp_path / "a", text=TINY), make(tmp_path / "b", "training.compile=true", text=TINY)
    assert plain.model.state_dict().keys() == compiled.model.state_dict().keys()
    for runner in (plain, compiled):
        runner._epoch(0)
    for name, value in plain.book.record["loss"].items():
        assert compiled.book.record["loss"][name] == pytest.approx(value, rel=0.02), name
    for epoch in (1, 2):
        compiled._epoch(epoch)
    assert compiled.finish().report.accuracy.identical_logits


METHOD = """
version: 1
name: compiled
model: {{name: bonn_resnet18, num_classes: 10, args: {{widths: [8, 8], depths: [2, 2]}}}}
data: {{name: digits, size: 16, per_class: 20}}
training: {{epochs: 3, batch_size: 50, compile: true, optimizer: {{name: adam, lr: 1e-2}}}}
modifiers: [{{type: binarize, method: {method}}}{more}]
"""


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("bonn", ", {type: filter_merge, keep: 0.5, start: 0, end: 2}"),
        ("abc, weight_bases: 2", ""),
    ],
)
def test_what_modifiers_do_between_steps_is_not_compiled(
    method: str, more: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: own(module, backend="eager"))
    runner = make(tmp_path, text=METHOD.format(method=method, more=more))
    runner.train(resume=False)
    assert runner.finish().report.accuracy.identical_logits


# --- ema -----------------------------------------------------------------------------------------


def test_the_moving_average_is_what_is_measured_and_packed_and_training_does_not_see_it(tmp_path: Path) -> None:
    plain, averaged = make(tmp_path / "a"), make(tmp_path / "b", "training.ema=0.9")
    expected: dict[str, Tensor] = {}
    update = averaged.stepper.ema.update  # type: ignore[union-attr]

    def follow(model: nn.Module, step: int) -> None:
        update(model, step=step)
        for name, tensor in model.state_dict().items():
            if step == 1 or not tensor.is_floating_point():
                expected[name] = tensor.clone()
            else:  # timm copies in its first update and averages from the second
                expected[name] = 0.9 * expected[name] + 0.1 * tensor

    averaged.stepper.ema.update = follow  # type: ignore[union-attr, method-assign]
    for runner in (plain, averaged):
        runner.train(resume=False)
    one, two = (load_state(tmp_path / name / STATE) for name in "ab")
    assert all(torch.equal(t, two["model"][name]) for name, t in one["model"].items())
    for name, tensor in expected.items():
        assert torch.allclose(two["ema"][name], tensor, rtol=1e-5, atol=1e-6), name
    outcome = averaged.finish()
    assert outcome.report.accuracy.identical_logits
    assert outcome.report.accuracy.trained_top1 == pytest.approx(averaged.metrics[-1]["test_top1"], abs=1e-4)
    packed = load_packed(tmp_path / "b").state_dict()
    assert torch.equal(packed["fc.bias"], two["ema"]["fc.bias"])
    assert not torch.equal(packed["fc.bias"], two["model"]["fc.bias"])


# --- norms ---------------------------------------------------------------------------------------


def test_synchronised_norms_keep_parameters_and_names_and_go_back() -> None:
    model = randomize_norms(recipe_model(parse_recipe(TINY)))
    names, images = list(model.state_dict()), torch.randn(4, 3, 8, 8)
    parameters = {id(p) for p in model.parameters()}
    before = model.eval()(images)
    norms = synchronise_norms(model)
    assert sum(isinstance(m, SyncedBatchNorm2d) for m in model.modules()) == len(norms) > 5
    assert list(model.state_dict()) == names
    assert {id(p) for p in model.parameters()} == parameters
    assert torch.equal(model(images), before)
    model.train()(images)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    restore_norms(model, norms)
    assert not any(isinstance(m, SyncedBatchNorm2d) for m in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# --- a GPU is not waited for ---------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts what would make a GPU's host wait: values that are read, shapes that depend on values."""

    READS = ("_local_scalar_dense", "bincount", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name == "index" and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        if name in self.READS or masked:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_the_counter_of_waits_sees_a_value_that_is_read() -> None:
    with Waits() as waits:
        float(torch.ones(()))
        torch.ones(3)[torch.ones(3, dtype=torch.bool)]
    assert waits.seen == ["_local_scalar_dense", "index"]


RESNET = """
version: 1
name: sixteen
model: {name: bonn_resnet18, num_classes: 10}
data: {name: digits, size: 32}
training: {epochs: 3, batch_size: 8, optimizer: {name: momentum, lr: 1e-3}}
modifiers:
  - {type: binarize, expect: 16}
  - {type: kernel_loss, lambda: 1e-4, nu: 1e-3}
  - {type: feature_loss, theta: 1e-3}
  - {type: filter_merge, keep: 0.5, start: 1}
"""


def test_a_step_of_resnet18_with_all_losses_reads_no_value() -> None:
    runner = make(None, text=RESNET)
    batch = batch_of(runner)
    runner.model.train()
    runner.session.clock.epoch = 1
    runner.session.clock.step = 0
    runner.stepper.take(1, 0, [batch])  # windows open: statistics are read once
    with Waits() as waits:
        taken = runner.stepper.take(1, 1, [batch])
    assert set(taken.losses) == {"task", "kernel", "feature", "pruning"}
    assert waits.seen == []


class Batches(list[Any]):
    """A loader of batches that are there already."""

    dataset = None


def test_the_runner_looks_at_a_gpus_losses_every_20_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make(None, "training.batch_size=16", text=TINY)
    steps = runner.steps
    assert steps == 84
    looks = []
    look = runner.book.look
    monkeypatch.setattr(runner.book, "look", lambda *args: looks.append(runner.book.counted) or look(*args))
    taken = Taken({"task": torch.zeros(())})
    monkeypatch.setattr(runner.stepper, "take", lambda *args: (runner.session.step(), taken)[1])
    monkeypatch.setattr(runner.session.modifiers[1], "losses", lambda batch: {})
    monkeypatch.setattr(type(runner.session.modifiers[1]), "adds_loss", classmethod(lambda cls: False))
    runner.task.loader = Batches([batch_of(runner)] * steps)  # type: ignore[assignment]
    runner.device = torch.device("meta")  # anything but the CPU, whose values cost nothing to read
    with Waits() as waits:
        runner._epoch(0)
    assert looks == [20, 40, 60, 80, 84]
    assert runner_module.LOOK_EVERY == 20
    weights = sum(tensor.is_floating_point() for tensor in runner.model.state_dict().values())
    assert len(waits.seen) < 2 * len(looks) + weights + 40  # the rest once an epoch: are they finite, the valleys


# --- bad steps -----------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, *places: tuple[int, int]) -> None:
    take = Stepper.take

    def poisoned(stepper: Stepper, epoch: int, step: int, parts: Any) -> Taken:
        if (epoch, step) in places:
            parts[0][0].fill_(float("nan"))
        return take(stepper, epoch, step, parts)

    monkeypatch.setattr(Stepper, "take", poisoned)


def test_a_bad_step_names_its_samples_and_the_last_good_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, (1, 4))
    runner = make(tmp_path)
    with pytest.raises(TrainingError) as stopped:
        runner.train(resume=False, checkpoint_every=3)
    samples = runner.task.sampler.samples(1, 4)
    message = str(stopped.value)
    assert "the task loss is nan at epoch 2, step 5" in message
    assert ", ".join(map(str, samples[:8])) + " and 120 more" in message
    assert f"{tmp_path / STATE} holds epoch 1 and 2 of 10 steps of the next" in message
    noted = json.loads((tmp_path / BAD_STEP).read_text())
    assert (noted["epoch"], noted["step"], noted["samples"]) == (2, 5, samples)


def test_bad_steps_are_skipped_up_to_the_limit_and_leave_no_trace_in_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, (0, 2), (1, 4))
    text = TINY.replace("{type: binarize}", "{type: binarize, threshold: always}") + ALL_LOSSES.lstrip("\n")
    runner = make(tmp_path, "training.skip_bad_steps=2", text=text)
    runner.train(resume=False)
    assert [record["skipped_steps"] for record in runner.metrics] == [1, 2, 2]
    said = [line for line in runner.progress.texts if "step skipped" in line]  # type: ignore[attr-defined]
    assert [line.partition(":")[0] for line in said] == ["epoch 1, step 3", "epoch 2, step 5"]
    assert "(2 of 2); samples " in said[1]
    assert all(bool(torch.isfinite(t).all()) for t in runner.model.state_dict().values())
    assert runner.finish().report.accuracy.identical_logits


def test_one_bad_step_too_many_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, (0, 2), (0, 4))
    with pytest.raises(TrainingError, match=r"not finite, for the 2. time, at epoch 1, step 5"):
        make(tmp_path, "training.skip_bad_steps=1").train(resume=False)


def test_skipping_that_finds_nothing_to_skip_changes_nothing(tmp_path: Path) -> None:
    for name, setting in (("a", "0"), ("b", "5")):
        make(tmp_path / name, f"training.skip_bad_steps={setting}").train(resume=False)
    one, two = (load_state(tmp_path / name / STATE) for name in "ab")
    one["session"]["recipe"] = two["session"]["recipe"]
    assert_same(one, two)


# --- bad samples ---------------------------------------------------------------------------------

FOLDER = """
version: 1
name: pictures
model: {name: bonn_wrn22_16, num_classes: 2, args: {depth: 10, widths: [8, 8, 8]}}
data: {name: imagefolder, root: ROOT, crop: 16, resize: 16, WORKERS}
training: {epochs: 2, batch_size: 4, optimizer: {name: adam, lr: 1e-2}}
modifiers: [{type: binarize}]
"""


@pytest.fixture
def pictures(tmp_path: Path) -> Iterator[Path]:
    """Two classes of eight pictures, three of them damaged."""
    root = tmp_path / "pictures"
    for part in ("train", "val"):
        for label in ("a", "b"):
            (root / part / label).mkdir(parents=True)
            for i in range(8):
                colour = (255 * (label == "a"), 30 * i, 0)
                Image.new("RGB", (20, 20), colour).save(root / part / label / f"{i}.png")
    for name in ("a/1.png", "a/2.png", "b/5.png"):
        (root / "train" / name).write_bytes(b"not a picture")
    return root


def of_pictures(root: Path, folder: Path, *settings: str, workers: int = 0) -> Runner:
    return make(folder, *settings, text=FOLDER.replace("ROOT", str(root)).replace("WORKERS", f"workers: {workers}"))


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_that_cannot_be_read_are_skipped_and_counted(pictures: Path, tmp_path: Path, workers: int) -> None:
    runner = of_pictures(pictures, tmp_path / "run", "data.max_corrupt=3", workers=workers)
    runner.train(resume=False)
    assert [record["corrupt_samples"] for record in runner.metrics] == [3, 3]
    assert "3 training samples can't be read and are skipped: 1, 2, 13" in runner.progress.texts  # type: ignore[attr-defined]
    resumed = of_pictures(pictures, tmp_path / "run", "data.max_corrupt=3", workers=workers)
    resumed._load(tmp_path / "run" / STATE)
    assert resumed.task.loader.dataset.corrupt.indices == [1, 2, 13]  # type: ignore[attr-defined]


def test_one_picture_too_many_is_an_error_with_its_path(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train/(a|b)/\d.png: not a picture, .*; more than max_corrupt: 2 can't be"):
        of_pictures(pictures, tmp_path / "run", "data.max_corrupt=2").train(resume=False)


def test_a_test_picture_that_cannot_be_read_is_always_an_error(pictures: Path, tmp_path: Path) -> None:
    (pictures / "val" / "b" / "3.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"val/b/3.png: not a picture"):
        of_pictures(pictures, tmp_path / "run", "data.max_corrupt=9").train(resume=False)


# --- a file system that loses the rename ---------------------------------------------------------


def test_a_lost_rename_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "state", b"old")
    monkeypatch.setattr("os.replace", lambda source, target: None)
    with pytest.raises(CheckpointError, match=r"state does not hold what was written a moment ago: its file system"):
        write_file(tmp_path / "state", b"new")
    with pytest.raises(CheckpointError, match=r"other does not hold"):
        write_file(tmp_path / "other", b"new")
    assert (tmp_path / "state").read_bytes() == b"old"
