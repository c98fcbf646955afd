"""What the logs of an epoch cost beside its training steps.

    python benchmarks/logging_cost.py --threads 2

For each recipe: training steps and what the runner writes after an epoch, in turns in one process, so that a machine
whose speed drifts slows both. The epoch is the last of the recipe: the files that are written anew hold all the others.
The share is the median time of writing over that of a step times the steps of an epoch; measuring the test set
is not counted among the steps, so the share of the whole run is smaller still.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch

from bonn_plugin import Recipe, Session, load_recipe, parse_recipe
from bonn_plugin.optim import make_optimizer
from bonn_plugin.recipe import recipe_model
from bonn_plugin.train.logs import LogOptions, Logs

RESNET = """
version: 1
name: bonn_resnet18_64px
model: {name: bonn_resnet18, num_classes: 1000}
data: {name: imagefolder, root: none, crop: 64}
training: {epochs: 70, batch_size: 64, optimizer: {name: sgd, lr: 1e-3, weight_decay: 1e-4}}
modifiers:
  - {type: binarize, targets: ['re:layer[1-4]\\.\\d\\.conv'], expect: 16}
  - {type: kernel_loss, lambda: 1e-4, nu: 1e-3}
"""
PLAIN, CSV, BOARD = "distributions.jsonl", "metrics.jsonl and summary.csv", "event files, scalars and histograms too"


def stepper(recipe: Recipe, size: int) -> tuple[Session, Callable[[], None]]:
    """Return a session, and a function that does one whole training step."""
    torch.manual_seed(0)
    session = Session(recipe, 10**6)
    model = session.prepare(recipe_model(recipe)).train()
    optimizer = make_optimizer(recipe.training.optimizer, session.param_groups())
    batch, classes = recipe.training.batch_size, recipe.model.num_classes
    images, labels = torch.randn(batch, 3, size, size), torch.randint(classes, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels) + session.loss(labels=labels).total
        loss.backward()
        optimizer.step()
        session.step()

    return session, step


def record(epoch: int) -> dict[str, object]:
    """Return a record as the runner makes them."""
    losses = {"task": 1 / epoch, "kernel": 0.1 / epoch}
    measured = {"test_top1": 98.1 - 1 / epoch, "test_top5": 99.9 - 1 / epoch}
    return {"epoch": epoch, "lr": 0.1 / epoch, "loss": losses, "valley": {"mean": 0.1, "max": 0.3}, **measured} | {
        "seconds": 1.0
    }


class Epoch:
    """What is written after the last epoch of a run, as often as one likes."""

    def __init__(self, session: Session, folder: Path, options: LogOptions) -> None:
        self.session, self.folder, self.options = session, folder, options
        self.epochs = session.epochs
        self.records = [record(epoch) for epoch in range(1, self.epochs + 1)]

    def write(self) -> tuple[float, float]:
        """Return the seconds of the distributions and of all else."""
        logs = Logs(self.folder, self.options, self.epochs)
        logs.begin(self.records[:-1], self.epochs - 1, resume=True)
        began = time.perf_counter()
        logs.moment(self.epochs, self.session.model)
        between = time.perf_counter()
        logs.write(self.records)
        ended = time.perf_counter()
        logs.close()
        return between - began, ended - between

    def fill(self) -> None:
        """Log all epochs but the last."""
        logs = Logs(self.folder, self.options, self.epochs)
        logs.begin([], 0, resume=False)
        for epoch in range(self.epochs):
            logs.moment(epoch, self.session.model)
        logs.close()


def measure(recipe: Recipe, size: int, steps: int, rounds: int) -> list[str]:
    """Return lines that say what an epoch's logs cost."""
    session, step = stepper(recipe, size)
    place = Path(tempfile.mkdtemp())
    kinds = {
        "plain": Epoch(session, place / "plain", LogOptions()),
        "distributions": Epoch(session, place / "distributions", LogOptions(distributions_every=1)),
        "board": Epoch(session, place / "board", LogOptions(tensorboard=True, distributions_every=1)),
    }
    for kind in kinds.values():
        kind.fill()
    step()
    step_times: list[float] = []
    times: dict[str, list[float]] = {CSV: [], PLAIN: [], BOARD: []}
    for turn in range(rounds + 1):
        for name, kind in kinds.items():
            began = time.perf_counter()
            step()
            taken = time.perf_counter() - began
            weights, rest = kind.write()
            if turn == 0:
                continue
            step_times.append(taken)
            if name == "plain":
                times[CSV].append(rest)
            elif name == "distributions":
                times[PLAIN].append(weights)
            else:
                times[BOARD].append(weights + rest)
    shutil.rmtree(place)
    epoch = median(step_times) * steps
    lines = [f"{recipe.name}: {steps} steps of {1e3 * median(step_times):.1f} ms an epoch"]
    for name, taken in times.items():
        lines.append(
            f"  {name}: {1e3 * median(taken):.1f} ms, {100 * median(taken) / epoch:.2f} % of the epoch's steps"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"{platform.machine()}, {args.threads} threads, torch {torch.__version__.partition('+')[0]}, "
        f"{datetime.now(UTC):%Y-%m-%d}; medians of {args.rounds} rounds"
    )
    digits = load_recipe(Path(__file__).parent.parent / "recipes" / "digits_wrn22_16.yaml")
    for line in measure(digits, 16, 1347 // digits.training.batch_size, args.rounds):
        print(line)
    for line in measure(parse_recipe(RESNET), 64, 50, args.rounds):
        print(line)


if __name__ == "__main__":
    main()
