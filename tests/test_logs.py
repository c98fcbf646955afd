"""What a run writes of its epochs: each stands there once, whatever happened, and says what metrics.jsonl says."""

from __future__ import annotations

import csv
import importlib.util
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bonn_plugin import train
from bonn_plugin.checkpoint import load_state
from bonn_plugin.errors import BonnError, CheckpointError
from bonn_plugin.files import write_file
from bonn_plugin.functional.methods import xnor_weight
from bonn_plugin.nn import BinaryConv2d, MethodConv2d
from bonn_plugin.nn.distribution_log import count_weights, weight_distributions
from bonn_plugin.train import DISTRIBUTIONS, EVENTS, METRICS, STATE, SUMMARY, LogOptions
from bonn_plugin.train.summary import summary_csv, summary_row
from tests.small import Command, run_child, run_ranks
from tests.test_faults import EPOCHS, LONGER, STEPS, after_steps, command, compress, kill
from tests.test_resume import Session, make

ALL = ("--tensorboard", "--log-distributions")


# --- counts ---------------------------------------------------------------------------------------


def reference(weight: torch.Tensor, mean_abs: float) -> list[int]:
    """Counts by numpy, in float64."""
    x = weight.numpy().astype(np.float64).ravel() / mean_abs
    inside, edges = np.histogram(x, bins=128, range=(-4.0, 4.0))
    assert (edges[0], edges[-1]) == (-4, 4)
    return [int((x < -4).sum()), *map(int, inside), int((x > 4).sum())]


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_those_of_numpy_in_float64(seed: int) -> None:
    torch.manual_seed(seed)
    spread = (0.01, 1.0, 100.0)[seed % 3]
    weight = spread * torch.randn(16, 8, 3, 3) * torch.rand(16, 1, 1, 1) ** 4
    mean_abs, counts = count_weights(weight)
    assert mean_abs == pytest.approx(float(np.abs(weight.numpy().astype(np.float64)).mean()), rel=1e-12)
    assert list(counts) == reference(weight, mean_abs)
    assert sum(counts) == weight.numel()


def with_mean_1(*values: torch.Tensor) -> torch.Tensor:
    """Return the values with zeros and one large number more, so that mean |x| is 1 and dividing moves nothing."""
    weight = torch.cat([*values, torch.zeros(2000)]).double()
    return torch.cat([weight, (weight.numel() + 1 - weight.abs().sum())[None]])


def test_values_on_an_edge_and_next_to_it_fall_where_numpy_puts_them() -> None:
    edges = torch.arange(-80, 81) / 16
    beside = [torch.nextafter(edges, torch.tensor(side)) for side in (-torch.inf, torch.inf)]
    weight = with_mean_1(edges, *beside, torch.tensor([1e-30, -1e-30, -0.0]))
    mean_abs, counts = count_weights(weight)
    assert mean_abs == 1.0
    assert list(counts) == reference(weight, mean_abs)


def test_the_last_bin_is_closed_and_the_others_half_open() -> None:
    mean_abs, counts = count_weights(with_mean_1(torch.tensor([4.0, -4.0, 0.0625, -0.0625])))
    assert mean_abs == 1.0
    assert (counts[0], counts[1], counts[64], counts[66], counts[128], counts[129]) == (0, 1, 1, 1, 1, 1)


def test_a_layer_of_zeros_is_counted_without_dividing() -> None:
    mean_abs, counts = count_weights(torch.zeros(4, 2))
    assert (mean_abs, counts[65], sum(counts)) == (0.0, 8, 8)


class PerFilter(nn.Module):
    """A layer with a scale for each filter."""

    def latent_weight(self) -> torch.Tensor:
        return torch.ones(2, 2)

    def weight_scale_mean(self) -> torch.Tensor:
        return torch.tensor([1.0, 2.0]).mean()


def test_layers_are_found_by_what_they_have() -> None:
    layer = BinaryConv2d(nn.Conv2d(4, 8, 3))
    with torch.no_grad():
        layer.modulation.copy_(torch.rand_like(layer.modulation))
    found = weight_distributions(nn.Sequential(nn.Conv2d(3, 4, 3), layer, PerFilter()))
    assert list(found) == ["1", "2"]
    assert found["1"].scale == float(layer.modulation.detach().mean())
    assert list(found["1"].counts) == reference(layer.weight.detach(), found["1"].mean_abs)
    assert (found["2"].scale, found["2"].mean_abs) == (1.5, 1.0)


def test_a_layer_of_another_method_is_logged_with_the_mean_of_its_scales() -> None:
    layer = MethodConv2d(nn.Conv2d(4, 8, 3), xnor_weight)
    (found,) = weight_distributions(nn.Sequential(layer)).values()
    filters = layer.weight.detach().abs().mean(dim=(1, 2, 3))
    assert found.scale == pytest.approx(float(filters.mean()), rel=1e-6)
    assert list(found.counts) == reference(layer.weight.detach(), found.mean_abs)


# --- the summary ----------------------------------------------------------------------------------


def test_a_row_has_the_columns_that_timm_writes() -> None:
    measured = {"test_loss": 0.5, "test_top1": 90.0, "test_top5": 99.0}
    record = {"epoch": 3, "lr": 0.1, "loss": {"task": 1.5, "kernel": 0.25}, **measured}
    row = summary_row({**record, "seconds": 2.0, "valley": {"mean": 0.5, "max": 0.75}, "skipped_steps": 1})
    assert row == {
        "epoch": 3,
        "train_loss": 1.75,
        "train_loss_task": 1.5,
        "train_loss_kernel": 0.25,
        "eval_loss": 0.5,
        "eval_top1": 90.0,
        "eval_top5": 99.0,
        "lr": 0.1,
        "seconds": 2.0,
        "valley_mean": 0.5,
        "valley_max": 0.75,
        "skipped_steps": 1,
    }


def test_a_detector_has_its_map() -> None:
    measured = {"test_map": 0.5, "test_map50": 0.75, "test_map75": 0.25}
    row = summary_row({"epoch": 1, "lr": 0.1, "loss": {"classification": 1.0}, "seconds": 2.0, **measured})
    assert [name for name in row if name.startswith("eval_")] == ["eval_map", "eval_map50", "eval_map75"]


def test_a_column_that_begins_later_is_empty_before() -> None:
    first = {"epoch": 1, "lr": 1 / 3, "loss": {"task": 0.1}, "seconds": 2.0, "test_top1": 1.0}
    second = {**first, "epoch": 2, "loss": {"task": 0.2, "kernel": 0.3}}
    rows = list(csv.DictReader(summary_csv([first, second]).splitlines()))
    assert list(rows[0]) == [
        "epoch",
        "train_loss",
        "train_loss_task",
        "train_loss_kernel",
        "eval_top1",
        "lr",
        "seconds",
    ]
    assert [row["train_loss_kernel"] for row in rows] == ["", "0.3"]
    assert float(rows[0]["lr"]) == 1 / 3


# --- a run ----------------------------------------------------------------------------------------


def lines(place: Path) -> list[Any]:
    return [json.loads(line) for line in place.read_text().splitlines()]


def events(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / EVENTS), size_guidance={"scalars": 0, "histograms": 0})
    found.Reload()
    return found


def assert_each_epoch_once(run: Path, epochs: int = EPOCHS) -> None:
    """Assert that all files of a run agree, and that each epoch stands once in each of them."""
    records = lines(run / METRICS)
    assert [record["epoch"] for record in records] == list(range(1, epochs + 1))
    assert (run / SUMMARY).read_text() == summary_csv(records)
    moments = lines(run / DISTRIBUTIONS)
    assert [moment["epoch"] for moment in moments] == list(range(epochs + 1))
    board = events(run)
    rows = [summary_row(record) for record in records]
    names = {name for row in rows for name in row} - {"epoch"}
    assert set(board.Tags()["scalars"]) == names
    for name in names:
        wanted = [(row["epoch"], np.float32(row[name])) for row in rows if name in row]
        assert [(event.step, np.float32(event.value)) for event in board.Scalars(name)] == wanted
    layers = moments[0]["layers"]
    assert set(board.Tags()["histograms"]) == {f"latent_weight/{name}" for name in layers}
    for name in layers:
        seen = board.Histograms(f"latent_weight/{name}")
        assert [event.step for event in seen] == list(range(epochs + 1))
        for event, moment in zip(seen, moments, strict=True):
            assert event.histogram_value.bucket == moment["layers"][name]["counts"]
            assert event.histogram_value.bucket_limit[:2] == [-4.0, -4.0 + 1 / 16]


@pytest.fixture
def bonn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(LONGER)
    return Command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts, with all logs."""
    place = tmp_path_factory.mktemp("whole")
    assert run_child(command, *ALL, cwd=recipe_in(place)).status == 0
    return place / "run"


def recipe_in(place: Path) -> Path:
    (place / "recipe.yaml").write_text(LONGER)
    return place


def test_a_whole_run_has_each_epoch_once_and_its_first_weights(whole: Path) -> None:
    assert_each_epoch_once(whole)
    moment = lines(whole / DISTRIBUTIONS)[0]
    assert moment["bins"] == [-4.0, 4.0, 128]
    assert all(len(layer["counts"]) == 130 for layer in moment["layers"].values())
    assert len(moment["layers"]) == 6


def test_the_logged_weights_are_those_of_the_state(whole: Path) -> None:
    state = load_state(whole / STATE)["model"]
    for name, layer in lines(whole / DISTRIBUTIONS)[-1]["layers"].items():
        weight = state[f"{name}.weight"]
        assert layer["counts"] == reference(weight, layer["mean_abs"])
        assert layer["scale"] == pytest.approx(float(state[f"{name}.modulation"].mean()), rel=1e-6)


def test_logging_changes_no_weight(bonn: Command, whole: Path, tmp_path: Path) -> None:
    assert compress(bonn).status == 0
    assert not (tmp_path / "run" / DISTRIBUTIONS).exists()
    assert not (tmp_path / "run" / EVENTS).exists()
    assert (tmp_path / "run" / SUMMARY).read_text() == summary_csv(lines(tmp_path / "run" / METRICS))
    plain, logged = (load_state(run / STATE)["model"] for run in (tmp_path / "run", whole))
    assert all(torch.equal(plain[name], logged[name]) for name in logged)


def killed_in_mid_epoch() -> None:
    Session.step = after_steps(STEPS + 4, kill)  # type: ignore[method-assign]
    command(*ALL, "--checkpoint-every", "3")


def killed_before(name: str, time: int) -> None:
    """Kill the process when it is about to write a file for the ``time``-th time."""
    seen = []

    def write(path: Path, content: bytes) -> None:
        seen.append(path.name)
        if seen.count(name) == time:
            kill()
        write_file(path, content)

    train.logs.write_file = write  # type: ignore[attr-defined]
    train.runner.write_file = write  # type: ignore[attr-defined]
    command(*ALL)


def killed_before_the_events() -> None:
    train.logs.Board.flush = lambda board: kill()  # type: ignore[attr-defined]
    command(*ALL)


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (killed_in_mid_epoch, ()),
        (killed_before, ("distributions.jsonl", 3)),
        (killed_before, ("state.pt", 2)),
        (killed_before, ("metrics.jsonl", 2)),
        (killed_before, ("summary.csv", 2)),
        (killed_before_the_events, ()),
    ],
)
def test_after_kill_and_resume_each_epoch_stands_once(
    target: Any, args: tuple[Any, ...], bonn: Command, whole: Path, tmp_path: Path
) -> None:
    assert run_child(target, *args, cwd=tmp_path).status == -signal.SIGKILL
    assert compress(bonn, "--resume", *ALL).status == 0
    assert_each_epoch_once(tmp_path / "run")
    assert (tmp_path / "run" / DISTRIBUTIONS).read_text() == (whole / DISTRIBUTIONS).read_text()


def test_a_finished_run_that_is_resumed_keeps_its_logs(bonn: Command, whole: Path, tmp_path: Path) -> None:
    assert compress(bonn, *ALL).status == 0
    (tmp_path / "run" / SUMMARY).unlink()
    assert compress(bonn, "--resume", *ALL).status == 0
    assert_each_epoch_once(tmp_path / "run")


def test_what_a_run_killed_in_its_first_epoch_left_is_taken_away(bonn: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / DISTRIBUTIONS).write_text('{"epoch": 0, "layers": {}}\n')
    assert compress(bonn, "--set", "training.epochs=1").status == 0
    assert not (run / DISTRIBUTIONS).exists()


def test_every_so_many_epochs_and_the_last(tmp_path: Path) -> None:
    runner = make(tmp_path)
    runner.logs.options = LogOptions(distributions_every=3)
    runner.train(resume=False)
    assert [moment["epoch"] for moment in lines(tmp_path / DISTRIBUTIONS)] == [0, 3, 4]


def test_the_weights_that_merging_has_pulled_together_are_the_same_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_in(folder: Path, stop_after: int | None) -> str:
        def broken() -> None:
            raise InterruptedError

        for resume in (False, True):
            runner = make(folder)
            runner.logs.options = LogOptions(distributions_every=1)
            with monkeypatch.context() as patch:
                if stop_after is not None and not resume:
                    patch.setattr(Session, "step", after_steps(stop_after, broken))
                    with pytest.raises(InterruptedError):
                        runner.train(resume=False)
                    (folder / DISTRIBUTIONS).write_text("")  # all of it is lost
                elif resume == (stop_after is not None):
                    runner.train(resume=resume)
        return (folder / DISTRIBUTIONS).read_text()

    whole, resumed = train_in(tmp_path / "whole", None), train_in(tmp_path / "resumed", 12)
    assert resumed.splitlines() == whole.splitlines()[2:]  # from the state's epoch on


def two_ranks() -> None:
    command(*ALL)


def test_of_two_processes_the_first_writes(tmp_path: Path) -> None:
    ended = run_ranks(two_ranks, ranks=2, cwd=recipe_in(tmp_path))
    assert [one.status for one in ended] == [0, 0], ended
    assert len(list((tmp_path / "run" / EVENTS).iterdir())) == 1
    assert_each_epoch_once(tmp_path / "run")


# --- mistakes -------------------------------------------------------------------------------------


def test_a_missing_tensorboard_is_told_before_training_starts(
    bonn: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tensorboard" else find(name, *a))
    result = compress(bonn, "--tensorboard")
    assert result.status == 2
    assert result.lines == ["--tensorboard needs the package tensorboard: pip install 'bonn_plugin[tensorboard]'"]
    assert not (tmp_path / "run").exists()


def test_an_interval_without_what_it_is_for_is_a_mistake(bonn: Command) -> None:
    result = compress(bonn, "--log-distributions-every", "2")
    assert (result.status, len(result.lines)) == (2, 1)
    assert "--log-distributions" in result.err
    with pytest.raises(BonnError, match="must be 1 or more"):
        LogOptions(distributions_every=0)


@pytest.mark.parametrize("damage", ["{", "[]\n", '{"layers": {}}\n'])
def test_damaged_distributions_are_named_on_resume(damage: str, tmp_path: Path) -> None:
    make(tmp_path).train(resume=False)
    (tmp_path / DISTRIBUTIONS).write_text(damage)
    with pytest.raises(CheckpointError, match=r"distributions\.jsonl: not what a run has logged"):
        make(tmp_path).train(resume=True)


def test_the_command_that_goes_on_keeps_the_logs(bonn: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Session, "step", after_steps(STEPS + 3, lambda: signal.raise_signal(signal.SIGTERM)))
        result = compress(bonn, *ALL, "--log-distributions-every", "2")
    assert result.status == 0
    assert "--tensorboard --log-distributions --log-distributions-every 2 --resume" in result.out
