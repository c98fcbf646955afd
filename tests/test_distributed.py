"""Several processes on gloo: the same training as one, one writer, and faults that name the process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bonn_plugin import parse_recipe, verify_packed
from bonn_plugin.checkpoint import load_state
from bonn_plugin.cli import main
from bonn_plugin.errors import DataError, TrainingError
from bonn_plugin.nn import BinaryConv2d
from bonn_plugin.session import Session
from bonn_plugin.train import STATE, Runner, Step, World, open_world
from bonn_plugin.train.classification import Classification
from bonn_plugin.train.detection import Detection
from bonn_plugin.train.stepper import Stepper, Taken
from bonn_plugin.train.world import launched
from tests.small import Ended, run_child, run_ranks
from tests.test_faults import after_steps, kill, tensors_of
from tests.test_resume import Silent

RECIPE = r"""
version: 1
name: together
model: {name: bonn_wrn22_16, num_classes: 10, args: {depth: 10, widths: [8, 8, 8]}}
data: {name: digits, size: 8, pad: 1}
training:
  epochs: 4
  batch_size: 256
  optimizer: {name: momentum, lr: 0.02, weight_decay: 1e-4}
modifiers:
  - {type: binarize, threshold: always}
  - {type: kernel_loss, lambda: 1e-3, nu: 1e-3}
  - {type: feature_loss, theta: 1e-2}
  - {type: filter_merge, keep: 0.5, start: 1, end: 3, loss_weight: 1e-3}
"""
STEPS = 5


# --- the same training ---------------------------------------------------------------------------


def trace_in_double(text: str, out: str) -> None:
    """Train in float64 and write what each step and each epoch gave; with several processes as they agree on it."""
    step, take, prepare = Classification.step, Stepper.take, Session.prepare
    losses: list[dict[str, float]] = []

    def step_in_double(task: Classification, model: Any, batch: Any, device: torch.device) -> Step:
        return step(task, model, [batch[0].double(), batch[1]], device)

    def prepare_in_double(session: Session, model: nn.Module, **more: Any) -> nn.Module:
        prepared = prepare(session, model.double(), **more)
        for module in session.own_modules():
            module.double()
        return prepared

    def noting(stepper: Stepper, epoch: int, number: int, parts: Any) -> Taken:
        taken = take(stepper, epoch, number, parts)
        names = sorted(taken.losses)
        values = torch.stack([taken.losses[name] for name in names])
        if stepper.world.ranks > 1:
            dist.all_reduce(values)
        losses.append(dict(zip(names, (values / stepper.world.ranks).tolist(), strict=True)))
        return taken

    def measure_in_double(task: Classification, model: Any, device: torch.device) -> Any:
        return task._scores(lambda images: model.eval()(images.double()).float(), task.own_test, together=True)

    Classification.step = step_in_double  # type: ignore[method-assign]
    Classification.measure = measure_in_double  # type: ignore[method-assign]
    Session.prepare = prepare_in_double  # type: ignore[method-assign, assignment]
    Stepper.take = noting  # type: ignore[method-assign]
    device = torch.device("cpu")
    world = open_world(device, 60)
    folder = Path(f"run{world.rank}") if world.rank else Path(out)
    runner = Runner(parse_recipe(text), folder, device, Silent(), world)
    runner.train(resume=False)
    state = {name: t.detach() for name, t in runner.model.state_dict().items()}
    for i, modifier in enumerate(runner.session.modifiers):
        for name, module in modifier.modules().items():
            state |= {f"{i}.{name}.{key}": t for key, t in module.state_dict().items()}
    for name, layer in runner.model.named_modules():
        if isinstance(layer, BinaryConv2d) and layer.merge is not None:
            state[f"{name}.groups"] = layer.merge.groups
    torch.save(state, f"{out}.{world.rank}.pt")
    assert (world.rank == 0) == folder.exists()
    if world.leads:
        Path(f"{out}.json").write_text(json.dumps({"losses": losses, "metrics": runner.metrics}))
    world.close()


def told(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same recipe on one process and on two."""
    place = tmp_path_factory.mktemp("traced")
    one = run_child(trace_in_double, RECIPE, "one", cwd=place)
    assert one.status == 0, one.err
    for ended in run_ranks(trace_in_double, RECIPE, "two", ranks=2, cwd=place):
        assert ended.status == 0, ended.err
    return place


def test_two_processes_have_the_losses_of_one_over_20_steps(traced: Path) -> None:
    one, two = told(traced, "one")["losses"], told(traced, "two")["losses"]
    assert len(one) == len(two) == 4 * STEPS
    assert set(one[-1]) == {"task", "kernel", "feature"}
    assert {name for losses in one for name in losses} == {"task", "kernel", "feature", "pruning"}
    for losses, others in zip(one, two, strict=True):
        assert losses == pytest.approx(others, rel=1e-9, abs=1e-9)


def test_two_processes_measure_every_test_sample_once(traced: Path) -> None:
    one, two = told(traced, "one")["metrics"], told(traced, "two")["metrics"]
    for record, other in zip(one, two, strict=True):
        for name in ("test_loss", "test_top1", "test_top5"):
            assert record[name] == pytest.approx(other[name], abs=1e-9)
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-9, abs=1e-9)


def test_every_process_has_the_same_weights_statistics_centres_thresholds_and_groups(traced: Path) -> None:
    first, second = (torch.load(traced / f"two.{rank}.pt") for rank in range(2))
    assert any(name.endswith("clusters.centers") for name in first)
    assert any(name.endswith(".groups") for name in first)
    assert any(name.endswith(".threshold") for name in first)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_two_processes_end_with_the_weights_of_one(traced: Path) -> None:
    one, two = (torch.load(traced / f"{name}.0.pt") for name in ("one", "two"))
    for name, tensor in one.items():
        assert torch.allclose(tensor.double(), two[name].double(), rtol=1e-8, atol=1e-9), name


DETECTION = """
version: 1
name: detection
model: {task: detection, detector: DETECTOR, name: bonn_resnet18, num_classes: 2, args: {widths: [8, 16, 16, 16]},
        strides: [8, 16], fpn: 32, anchor_scale: 0.5, min_size: 64, max_size: 64}
data: {name: digit_scenes, size: 64, train: 24, test: 13, digits: [1, 3], scale: [0.3, 0.8], one_class: true}
training: {epochs: 7, batch_size: 8, optimizer: {name: momentum, lr: 1e-3}}
modifiers:
  - {type: binarize, threshold: always}
  - {type: kernel_loss, lambda: 1e-5, nu: 1e-3}
"""


def trace_detection(kind: str, out: str) -> None:
    """Like ``trace_in_double``, for detection."""
    step = Detection.step

    def step_in_double(task: Detection, model: Any, batch: Any, device: torch.device) -> Step:
        images, targets = batch
        wide = [{**target, "boxes": target["boxes"].double()} for target in targets]
        return step(task, model, ([image.double() for image in images], wide), device)

    def measure_in_double(task: Detection, model: Any, device: torch.device) -> Any:
        model.eval().float()  # pycocotools takes what the test of one process takes
        scores = measure(task, model, device)
        model.double()
        return scores

    measure = Detection.measure
    Detection.step = step_in_double  # type: ignore[method-assign]
    Detection.measure = measure_in_double  # type: ignore[method-assign, assignment]
    trace_in_double(DETECTION.replace("DETECTOR", kind), out)


@pytest.mark.parametrize("kind", ["fcos", "retinanet", "ssd"])
def test_two_processes_train_a_detector_as_one_does(kind: str, tmp_path: Path) -> None:
    one = run_child(trace_detection, kind, "one", cwd=tmp_path)
    assert one.status == 0, one.err
    for ended in run_ranks(trace_detection, kind, "two", ranks=2, cwd=tmp_path):
        assert ended.status == 0, ended.err
    first, second = told(tmp_path, "one"), told(tmp_path, "two")
    assert len(first["losses"]) == 21
    for losses, others in zip(first["losses"], second["losses"], strict=True):
        assert losses == pytest.approx(others, rel=1e-9, abs=1e-9)
    for record, other in zip(first["metrics"], second["metrics"], strict=True):
        assert record["test_map50"] == pytest.approx(other["test_map50"], abs=1e-9)


# --- the command ---------------------------------------------------------------------------------

COMMAND = RECIPE.replace("  - {type: filter_merge, keep: 0.5, start: 1, end: 3, loss_weight: 1e-3}\n", "")


def command(*more: str) -> None:
    sys.argv = ["bonn", "compress", "recipe.yaml", "--out", "run", "--device", "cpu", *more]
    main()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(COMMAND)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes that nothing interrupts."""
    place = tmp_path_factory.mktemp("together")
    (place / "recipe.yaml").write_text(COMMAND)
    for ended in run_ranks(command, ranks=2, cwd=place):
        assert (ended.status, ended.err) == (0, "")
    return place


def output(place: Path, rank: int) -> str:
    return (place / f"stderr{rank}.out").read_text()


def test_only_the_first_process_writes_and_prints(whole: Path) -> None:
    assert output(whole, 1) == ""
    lines = output(whole, 0).splitlines()
    assert "device cpu, 2 processes, float32" in lines[0]
    assert sum(line.startswith("epoch ") for line in lines) == 4
    assert verify_packed(whole / "run").identical
    metrics = [json.loads(line) for line in (whole / "run" / "training" / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in metrics] == [1, 2, 3, 4]


def assert_same(run: Path, whole: Path) -> None:
    one, other = load_state(run / STATE), load_state(whole / STATE)
    for part in ("session", "model", "optimizer"):
        for a, b in zip(tensors_of(one[part]), tensors_of(other[part]), strict=True):
            assert torch.equal(a, b)
    assert verify_packed(run).identical


def resume(place: Path, ranks: int = 2) -> None:
    for ended in run_ranks(command, "--resume", ranks=ranks, cwd=place):
        assert (ended.status, ended.err) == (0, "")


def test_a_batch_that_does_not_divide_is_told(place: Path) -> None:
    (place / "recipe.yaml").write_text(COMMAND.replace("batch_size: 256", "batch_size: 255"))
    ended = run_ranks(command, ranks=2, cwd=place)
    assert [e.status for e in ended] == [2, 2]
    assert "recipe.yaml:8:15: batch_size is that of all processes together: 255 can't be cut" in ended[0].err


def test_torchrun_starts_it(tmp_path: Path) -> None:
    text = COMMAND.replace("epochs: 4", "epochs: 2").replace("size: 8, pad: 1", "size: 8")
    (tmp_path / "recipe.yaml").write_text(text)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "bonn_plugin", "compress", "recipe.yaml", "--device", "cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    assert done.stdout.count("verified runs/together") == 1


# --- faults --------------------------------------------------------------------------------------


def only_on_rank_1(act: Any) -> None:
    """Do ``act`` in process 1 after the 7th step."""
    if os.environ["RANK"] == "1":
        Session.step = after_steps(STEPS + 2, act)  # type: ignore[method-assign]


def one_is_killed() -> None:
    only_on_rank_1(kill)
    command("--checkpoint-every", "6")


def check_advice(ended: Ended) -> None:
    assert len(ended.err.splitlines()) == 1, ended.err
    assert "run/training/state.pt holds epoch 1 and 1 of 5 steps of the next: go on with --resume" in ended.err


def test_a_killed_process_is_named_and_the_run_goes_on_from_its_state(place: Path, whole: Path) -> None:
    began = time.monotonic()
    first, second = run_ranks(one_is_killed, ranks=2, cwd=place)
    assert (first.status, second.status) == (2, -signal.SIGKILL)
    assert time.monotonic() - began < 60
    assert re.search(r"rank 1 died, last heard of at (the end of )?epoch \d, step \d; ", first.err)
    check_advice(first)
    resume(place)
    assert_same(place / "run", whole / "run")


def one_hangs() -> None:
    only_on_rank_1(lambda: time.sleep(1000))
    command("--checkpoint-every", "6", "--rank-timeout", "3")


def test_a_hanging_process_is_named_and_all_end(place: Path) -> None:
    first, second = run_ranks(one_hangs, ranks=2, cwd=place)
    assert (first.status, second.status) == (1, 1)
    assert "rank 1 hangs: for 3 s it is at epoch 2, step 2, and others wait for it" in first.err
    check_advice(first)


def one_is_stopped() -> None:
    only_on_rank_1(lambda: os.kill(os.getpid(), signal.SIGSTOP))
    command("--checkpoint-every", "6", "--rank-timeout", "3")


def test_a_process_that_gives_no_sign_of_life_is_named(place: Path) -> None:
    first, _ = run_ranks(one_is_stopped, ranks=2, cwd=place)
    assert first.status == 1
    assert "rank 1 gave no sign of life for 3 s, last heard of at " in first.err
    check_advice(first)


def one_finds_a_bad_sample() -> None:
    def refuse() -> None:
        raise DataError("here/x.jpg: not a picture")

    only_on_rank_1(refuse)
    command("--checkpoint-every", "6")


def test_an_error_of_one_process_is_told_by_it_and_by_the_first(place: Path) -> None:
    first, second = run_ranks(one_finds_a_bad_sample, ranks=2, cwd=place)
    assert (first.status, second.status) == (2, 2)
    assert second.err == "rank 1: here/x.jpg: not a picture\n"
    assert "rank 1 stopped: here/x.jpg: not a picture; " in first.err
    check_advice(first)


def one_has_a_nan() -> None:
    take = Stepper.take

    def poisoned(stepper: Stepper, epoch: int, step: int, parts: Any) -> Taken:
        if os.environ["RANK"] == "1" and (epoch, step) == (1, 2):
            parts[0][0].fill_(float("nan"))
        return take(stepper, epoch, step, parts)

    Stepper.take = poisoned  # type: ignore[method-assign]
    command("--checkpoint-every", "6")


def test_a_loss_that_is_no_number_on_one_process_stops_all_with_one_line(place: Path) -> None:
    first, second = run_ranks(one_has_a_nan, ranks=2, cwd=place)
    assert (first.status, second.status) == (2, 2)
    assert second.err == ""
    assert "at epoch 2, step 3" in first.err
    check_advice(first)


def one_gets_sigterm() -> None:
    only_on_rank_1(lambda: signal.raise_signal(signal.SIGTERM))
    command()


def test_sigterm_on_one_process_stops_all_at_the_same_step_and_one_process_can_go_on(place: Path) -> None:
    for ended in run_ranks(one_gets_sigterm, ranks=2, cwd=place):
        assert (ended.status, ended.err) == (0, "")
    assert "1 of 4 epochs and 2 steps are saved" in output(place, 0)
    resume(place, ranks=1)
    assert "the state is of 2 processes, this run has 1: each step has the same samples" in output(place, 0)
    assert verify_packed(place / "run").identical


# --- the environment -----------------------------------------------------------------------------


@pytest.fixture
def environment() -> dict[str, str]:
    return {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"}


def test_a_process_without_torchrun_is_alone() -> None:
    assert launched({"WORLD_SIZE": "4"}) == (0, 1, 0)
    assert World().leads
    assert World().most([1.5]) == [1.5]


@pytest.mark.parametrize(("name", "value"), [("RANK", "x"), ("RANK", "4"), ("MASTER_PORT", "")])
def test_a_wrong_environment_is_told(environment: dict[str, str], name: str, value: str) -> None:
    assert launched(environment) == (1, 4, 1)
    with pytest.raises(TrainingError, match="start by torchrun"):
        launched({**environment, name: value})
