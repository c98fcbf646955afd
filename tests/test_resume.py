"""Going on in the middle of an epoch: the weights are those of the run that nothing interrupted, bit for bit."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bonn_plugin import parse_recipe
from bonn_plugin.checkpoint import load_state
from bonn_plugin.sampling import Draw, Share, StepSampler, seed_step
from bonn_plugin.session import Session
from bonn_plugin.train import STATE, Runner, Stopped, StopRequest
from bonn_plugin.train.classification import Classification
from tests.small import Command
from tests.test_faults import after_steps, said_command, tensors_of

RECIPE = """
version: 1
name: everything
model: {name: bonn_wrn22_16, num_classes: 10, args: {depth: 10, widths: [8, 8, 8], drop_rate: 0.2}}
data: {name: digits, size: 8, pad: 2, workers: WORKERS}
training:
  epochs: 4
  batch_size: 256
  accumulate: 2
  ema: 0.9
  optimizer: {name: adam, lr: 1e-2}
  schedule: {name: cosine, warmup_epochs: 1}
modifiers:
  - {type: binarize, threshold: always}
  - {type: kernel_loss, lambda: 1e-3, nu: 1e-3, start: 1}
  - {type: feature_loss, theta: 1e-2, start: 0, end: 3}
  - {type: filter_merge, keep: 0.5, start: 1, end: 3}
"""
STEPS = 5  # of an epoch: 1,347 samples


class Silent:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def line(self, text: str) -> None:
        self.texts.append(text)

    def steps(self, batches: Any, epoch: int, epochs: int, total: int) -> Iterator[Any]:
        yield from batches


def make(folder: Path, text: str = RECIPE, workers: int = 0) -> Runner:
    recipe = parse_recipe(text.replace("WORKERS", str(workers)))
    return Runner(recipe, folder, torch.device("cpu"), Silent())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The state of the run that nothing interrupts."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    make(folder).train(resume=False)
    return load_state(folder / STATE)


def assert_same(state: Any, whole: Any) -> None:
    for part in ("session", "model", "optimizer", "ema"):
        pairs = list(zip(tensors_of(state[part]), tensors_of(whole[part]), strict=True))
        assert all(torch.equal(a, b) for a, b in pairs), part
    for record, wanted in zip(state["metrics"], whole["metrics"], strict=True):
        assert {**record, "seconds": 0} == {**wanted, "seconds": 0}


class Broken(Exception):
    pass


def broken_after(steps: int, folder: Path, monkeypatch: pytest.MonkeyPatch, every: int | None = None) -> None:
    """Train until so many steps are done, with a state after every ``every`` steps."""

    def stop() -> None:
        raise Broken

    with monkeypatch.context() as patch:
        patch.setattr(Session, "step", after_steps(steps, stop))
        with pytest.raises(Broken):
            make(folder).train(resume=False, checkpoint_every=every)


# in the epoch that gathers features; in the first of kernel loss and merging; with all losses; after both windows
@pytest.mark.parametrize("steps", [2, 7, 13, 19])
def test_a_run_goes_on_in_mid_epoch_with_all_modifiers_ema_dropout_and_augmentation(
    steps: int, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_after(steps + 1, tmp_path, monkeypatch, every=steps)
    kept = load_state(tmp_path / STATE)["session"]
    assert kept["epoch"] * STEPS + kept["step"] == steps
    torch.manual_seed(99)  # whatever other random numbers were drawn before
    random.seed(99)
    resumed = make(tmp_path)
    resumed.train(resume=True)
    assert_same(load_state(tmp_path / STATE), whole)


def test_the_number_of_loader_workers_does_not_matter(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_after(8, tmp_path, monkeypatch, every=7)
    state = load_state(tmp_path / STATE)
    resumed = make(tmp_path, workers=2)
    state["session"]["recipe"] = resumed.recipe.fingerprint
    torch.save(state, tmp_path / STATE)
    resumed.train(resume=True)
    assert_same(load_state(tmp_path / STATE), whole)


def test_states_in_mid_epoch_change_nothing(whole: dict[str, Any], tmp_path: Path) -> None:
    make(tmp_path).train(resume=False, checkpoint_every=1)
    assert_same(load_state(tmp_path / STATE), whole)


def test_a_request_to_stop_saves_the_step_it_came_in(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopRequest()
    with monkeypatch.context() as patch, stop.listening():
        patch.setattr(Session, "step", after_steps(8, lambda: signal.raise_signal(signal.SIGTERM)))
        with pytest.raises(Stopped):
            make(tmp_path).train(resume=False, stop=stop)
    kept = load_state(tmp_path / STATE)["session"]
    assert (kept["epoch"], kept["step"]) == (1, 3)
    make(tmp_path).train(resume=True)
    assert_same(load_state(tmp_path / STATE), whole)


def test_a_request_while_measuring_loses_no_step_and_the_measurement_is_made_again(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopRequest()
    with monkeypatch.context() as patch, stop.listening():
        patch.setattr(Classification, "measure", lambda *_: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped):
            make(tmp_path).train(resume=False, stop=stop)
    state = load_state(tmp_path / STATE)
    assert (state["session"]["epoch"], state["metrics"]) == (1, [])
    make(tmp_path).train(resume=True)
    assert_same(load_state(tmp_path / STATE), whole)


def test_a_request_in_the_last_step_of_an_epoch_measures_it_first(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopRequest()
    with monkeypatch.context() as patch, stop.listening():
        patch.setattr(Session, "step", after_steps(STEPS, lambda: signal.raise_signal(signal.SIGTERM)))
        with pytest.raises(Stopped):
            make(tmp_path).train(resume=False, stop=stop)
    assert load_state(tmp_path / STATE)["session"]["epoch"] == 1
    make(tmp_path).train(resume=True)
    assert_same(load_state(tmp_path / STATE), whole)


def test_loader_workers_do_not_take_the_signal() -> None:
    stop = StopRequest()
    with stop.listening(), stop.urgent():
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not stop.asked


def test_sigterm_ends_the_command_with_status_0_and_the_command_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("WORKERS", "0"))
    bonn = Command(monkeypatch, capsys)
    options = ("compress", "recipe.yaml", "--out", "run", "--device", "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(Session, "step", after_steps(8, lambda: signal.raise_signal(signal.SIGTERM)))
        result = bonn(*options, "--checkpoint-every", "100")
    assert (result.status, result.err) == (0, "")
    assert "stopped by SIGTERM; 1 of 4 epochs and 3 steps are saved. Go on with: " in result.out
    text = result.out.replace("stopped by SIGTERM", "interrupted")
    _, *command = said_command(type(result)(0, text, ""))
    assert "--checkpoint-every" in command
    resumed = bonn(*command)
    assert resumed.status == 0
    assert "epochs 2 to 4, from step 4" in resumed.out


def test_a_message_names_the_state_in_mid_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make(tmp_path)
    assert "no state is saved" in runner._saved_text()
    runner.saved, runner.saved_steps = 2, 3
    assert f"state.pt holds epoch 2 and 3 of {STEPS} steps of the next" in runner._saved_text()


# --- the samples of a step -----------------------------------------------------------------------


def drawn(share: Share, epoch: int = 3, start: int = 0) -> list[list[Draw]]:
    sampler = StepSampler(range(50), 7, 12, share)
    sampler.epoch, sampler.start = epoch, start
    assert len(sampler) == (4 - start) * share.parts
    return list(sampler)


@pytest.mark.parametrize(("ranks", "parts"), [(1, 2), (2, 1), (2, 3), (3, 2), (12, 1)])
def test_processes_and_micro_batches_share_each_step_without_a_double(ranks: int, parts: int) -> None:
    whole = drawn(Share())
    pieces = [drawn(Share(rank, ranks, parts)) for rank in range(ranks)]
    for step in range(4):
        taken = [d for piece in pieces for group in piece[step * parts : (step + 1) * parts] for d in group]
        assert sorted(taken, key=lambda d: d.index) == sorted(whole[step], key=lambda d: d.index)


def test_an_epoch_can_be_entered_at_any_step() -> None:
    assert drawn(Share(1, 2, 2), start=3) == drawn(Share(1, 2, 2))[6:]


def test_the_indices_of_a_step_are_those_that_were_drawn() -> None:
    sampler = StepSampler(range(50), 7, 12)
    assert sampler.samples(3, 2) == [draw.index for draw in drawn(Share())[2]]


def test_every_place_of_every_epoch_has_random_numbers_of_its_own() -> None:
    seeds = [draw.seed for epoch in range(20) for group in drawn(Share(), epoch) for draw in group]
    assert len(set(seeds)) == len(seeds)


def test_a_step_seeds_every_generator_and_ranks_differ() -> None:
    def numbers(*place: int) -> tuple[float, float, float]:
        seed_step(*place)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first = numbers(0, 1, 2, 0)
    assert numbers(0, 1, 2, 0) == first
    for other in ((1, 1, 2, 0), (0, 2, 2, 0), (0, 1, 3, 0), (0, 1, 2, 1)):
        assert all(a != b for a, b in zip(numbers(*other), first, strict=True))
