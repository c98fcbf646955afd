"""Faults while a run is under way: killed, interrupted, a full disk, a loss that explodes. Nothing good is lost."""

from __future__ import annotations

import errno
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from bonn_plugin import train, verify_packed
from bonn_plugin.checkpoint import load_state
from bonn_plugin.cli import main
from bonn_plugin.files import write_file
from bonn_plugin.session import Session
from tests.small import RECIPE, Command, Result, contents, run_child, run_here

EPOCHS = 3
LONGER = RECIPE.replace("epochs: 1", f"epochs: {EPOCHS}").replace("batch_size: 256", "batch_size: 128")
STEPS = 10  # of an epoch: 1,347 samples


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The children have one thread: sums must be taken in the same order here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bonn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(LONGER)
    return Command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts."""
    place = tmp_path_factory.mktemp("whole")
    (place / "recipe.yaml").write_text(LONGER)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        assert run_here(patch, "compress", place / "recipe.yaml", "--out", place / "run", "--device", "cpu") == 0
    return place / "run"


def compress(bonn: Command, *more: str) -> Result:
    return bonn("compress", "recipe.yaml", "--out", "run", "--device", "cpu", *more)


def tensors_of(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors_of(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from tensors_of(value)


def assert_same_run(run: Path, whole: Path) -> None:
    """Assert that two finished runs are equal bit for bit: training state, packed tensors, metrics."""
    one, other = load_state(run / "training" / "state.pt"), load_state(whole / "training" / "state.pt")
    pairs = list(zip(tensors_of(one), tensors_of(other), strict=True))
    assert len(pairs) > 2 * len(one["model"])  # weights, statistics, and Adam's moments
    assert all(torch.equal(a, b) for a, b in pairs)
    packed, expected = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (run, whole))
    assert packed.keys() == expected.keys()
    assert all(torch.equal(packed[name], expected[name]) for name in expected)
    for record, wanted in zip(one["metrics"], other["metrics"], strict=True):
        assert {**record, "seconds": 0} == {**wanted, "seconds": 0}
    lines = (run / "training" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == EPOCHS
    assert verify_packed(run).identical


def command(*args: str) -> None:
    """Run the command in a child, which ends with it."""
    sys.argv = ["bonn", "compress", "recipe.yaml", "--out", "run", "--device", "cpu", *args]
    main()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after_steps(steps: int, act: Callable[[], object]) -> Callable[[Session], None]:
    """Return a ``Session.step`` that calls ``act`` when so many steps are done."""
    step = Session.step

    def count(session: Session) -> None:
        step(session)
        if session.clock.epoch * session.clock.steps_per_epoch + session.clock.step == steps:
            act()

    return count


def killed_in_mid_epoch() -> None:
    Session.step = after_steps(STEPS + 4, kill)  # type: ignore[method-assign]
    command()


def test_a_run_killed_in_mid_epoch_ends_with_the_same_weights(bonn: Command, whole: Path, tmp_path: Path) -> None:
    assert run_child(killed_in_mid_epoch, cwd=tmp_path).status == -signal.SIGKILL
    state = load_state(tmp_path / "run" / "training" / "state.pt")
    assert (state["session"]["epoch"], state["session"]["step"]) == (1, 0)
    assert not (tmp_path / "run" / "config.json").exists()
    assert compress(bonn, "--resume").status == 0
    assert_same_run(tmp_path / "run", whole)


def killed_after_the_state() -> None:
    def write(path: Path, content: bytes) -> None:
        if path.name == "metrics.jsonl":
            kill()
        write_file(path, content)

    train.logs.write_file = write
    command()


def test_a_run_killed_between_state_and_metrics_loses_no_line(bonn: Command, whole: Path, tmp_path: Path) -> None:
    assert run_child(killed_after_the_state, cwd=tmp_path).status == -signal.SIGKILL
    assert not (tmp_path / "run" / "training" / "metrics.jsonl").exists()
    assert compress(bonn, "--resume").status == 0
    assert_same_run(tmp_path / "run", whole)


def test_metrics_that_a_kill_after_the_last_state_left_behind_are_written_on_resume(
    bonn: Command, whole: Path, tmp_path: Path
) -> None:
    assert compress(bonn).status == 0
    metrics = tmp_path / "run" / "training" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:-1]))
    assert compress(bonn, "--resume").status == 0
    assert metrics.read_text() == "".join(lines)


def killed_while_it_writes_the_second_state() -> None:
    fsync = os.fsync
    seen = []

    def half(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.endswith(".state.pt.tmp"):
            seen.append(path)
        if len(seen) == 2:
            os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
            kill()
        fsync(descriptor)

    os.fsync = half
    command()


def test_a_run_killed_while_it_writes_the_state_keeps_the_state_before(
    bonn: Command, whole: Path, tmp_path: Path
) -> None:
    assert run_child(killed_while_it_writes_the_second_state, cwd=tmp_path).status == -signal.SIGKILL
    assert load_state(tmp_path / "run" / "training" / "state.pt")["session"]["epoch"] == 1
    assert compress(bonn, "--resume").status == 0
    assert_same_run(tmp_path / "run", whole)


def interrupt() -> None:
    """Send this process a real SIGINT, as Ctrl-C does."""
    signal.raise_signal(signal.SIGINT)


def said_command(result: Result) -> list[str]:
    """Return the command that an interrupted run names, as a shell would split it."""
    last = result.out.splitlines()[-1]
    assert last.startswith("interrupted; ")
    return shlex.split(last.partition("Go on with: ")[2])


def test_ctrl_c_prints_the_command_that_goes_on(
    bonn: Command, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Session, "step", after_steps(2 * STEPS + 3, interrupt))
        result = compress(bonn, "--set", "model.args={widths: [8, 8, 8], depth: 10}")
    assert result.status == 130
    assert result.err == ""
    assert len(result.out.splitlines()) == 4  # what is trained, two epochs, how to go on
    assert f"2 of {EPOCHS} epochs are saved" in result.out
    name, *command = said_command(result)
    assert name == "bonn"
    assert bonn(*command).status == 0
    assert_same_run(tmp_path / "run", whole)


def test_ctrl_c_in_the_first_epoch_names_a_command_that_starts_anew(
    bonn: Command, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Session, "step", after_steps(3, interrupt))
        result = compress(bonn)
    assert result.status == 130
    assert "nothing is saved yet" in result.out
    _, *command = said_command(result)
    assert bonn(*command).status == 0
    assert_same_run(tmp_path / "run", whole)


def test_ctrl_c_after_the_last_step_counts_only_what_is_on_the_disk(
    bonn: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            Session, "step", after_steps(2 * STEPS, interrupt)
        )  # the second epoch is over, its state not yet written
        result = compress(bonn)
    assert result.status == 130
    assert f"1 of {EPOCHS} epochs are saved" in result.out
    assert load_state(tmp_path / "run" / "training" / "state.pt")["session"]["epoch"] == 1


def test_ctrl_c_while_packing_names_the_command_too(
    bonn: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Session, "convert", lambda session, calibration: interrupt())
        result = compress(bonn)
    assert result.status == 130
    assert "--resume" in said_command(result)


def test_a_finished_run_that_is_resumed_only_finishes(bonn: Command, whole: Path, tmp_path: Path) -> None:
    assert compress(bonn).status == 0
    run = tmp_path / "run"
    before = contents(run)
    (run / "config.json").unlink()
    result = compress(bonn, "--resume")
    assert result.status == 0
    assert "trained already" in result.out
    assert "epoch 1" not in result.out
    assert contents(run) == before
    assert_same_run(run, whole)


# --- full disks ----------------------------------------------------------------------------------


def on_a_small_disk() -> None:
    limit = (20_000, 20_000)  # bytes of a file
    fill = after_steps(2 * STEPS, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    Session.step = fill  # type: ignore[method-assign]
    command()


def test_a_disk_that_takes_no_more_keeps_the_last_state(bonn: Command, whole: Path, tmp_path: Path) -> None:
    child = run_child(on_a_small_disk, cwd=tmp_path)
    assert child.status == 2, child.err
    assert len(child.err.splitlines()) == 1
    assert "can't write to run/training: File too large" in child.err
    assert "what was saved there before is untouched" in child.err
    assert load_state(tmp_path / "run" / "training" / "state.pt")["session"]["epoch"] == 1
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert compress(bonn, "--resume").status == 0
    assert_same_run(tmp_path / "run", whole)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 160 kB; only root can make one."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "none", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("no right to mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_real_full_disk_keeps_the_last_state(bonn: Command, tiny_disk: Path) -> None:
    run = tiny_disk / "run"
    result = bonn("compress", "recipe.yaml", "--out", run, "--device", "cpu")
    assert result.status == 2, "the disk is too large to be full"
    assert result.lines == [
        f"can't write to {run}/training: No space left on device; what was saved there before is untouched"
    ]
    assert load_state(run / "training" / "state.pt")["session"]["epoch"] >= 1


@pytest.mark.parametrize("file", ["model.safetensors", "recipe.yaml", "config.json"])
def test_a_disk_full_while_packing_keeps_the_checkpoint(
    file: str, bonn: Command, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = contents(run)
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f".{file}.tmp"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = compress(bonn, "--resume")
    assert result.status == 2
    assert result.lines == ["can't write to run: No space left on device; what was saved there before is untouched"]
    assert contents(run) == before
    assert verify_packed(run).identical


# --- numbers that are none -----------------------------------------------------------------------


def test_a_loss_that_explodes_stops_with_the_step_and_keeps_the_last_state(
    bonn: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Session.step

    def explode(session: Session) -> None:
        step(session)
        if (session.clock.epoch, session.clock.step) == (1, 4):
            with torch.no_grad():
                next(session.model.parameters()).mul_(float("nan"))

    monkeypatch.setattr(Session, "step", explode)
    result = compress(bonn)
    assert result.status == 2
    assert len(result.lines) == 1
    assert "the task loss is nan at epoch 2, step 5: lower the learning rate" in result.err
    assert "run/training/state.pt holds epoch 1" in result.err
    state = load_state(tmp_path / "run" / "training" / "state.pt")
    assert state["session"]["epoch"] == 1
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors_of(state["model"]))


def test_a_loss_that_explodes_at_once_says_that_nothing_is_saved(bonn: Command, tmp_path: Path) -> None:
    result = compress(bonn, "--set", "training.optimizer={name: sgd, lr: 1e+30}")
    assert result.status == 2
    assert len(result.lines) == 1
    assert "at epoch 1, step 2" in result.err
    assert "no epoch was finished" in result.err
    assert not (tmp_path / "run" / "training" / "state.pt").exists()


def test_weights_that_explode_in_the_last_step_of_an_epoch_are_not_saved(
    bonn: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Session.step

    def explode(session: Session) -> None:
        step(session)
        if (session.clock.epoch, session.clock.step) == (2, 0):
            with torch.no_grad():
                session.model.get_parameter("fc.bias").fill_(float("inf"))

    monkeypatch.setattr(Session, "step", explode)
    result = compress(bonn)
    assert result.status == 2
    assert len(result.lines) == 1
    assert f"fc.bias is not finite at epoch 2, step {STEPS}" in result.err
    assert load_state(tmp_path / "run" / "training" / "state.pt")["session"]["epoch"] == 1
