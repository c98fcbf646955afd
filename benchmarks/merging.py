"""What merging filters costs on digits: learned, against K-means after training and against dropping filters.

    python benchmarks/merging.py --out runs/merging             # 5 seeds, about an hour on one core
    python benchmarks/merging.py --out runs/merging --table     # the table of what has been measured so far

All rows have one network, one schedule and one seed each; only what becomes of the filters differs. Each
finished training is a line in OUT/results.jsonl, and is not run again. Equal stored bits: of a layer as many
filters of largest norm are kept as fit in the bits of the merged filters and their index.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bonn_plugin.functional import group_count, group_filters
from bonn_plugin.modifiers import Modifier, WindowConfig, register_modifier
from bonn_plugin.nn import BinaryConv2d, FilterMerge, Role
from bonn_plugin.recipe import parse_recipe
from bonn_plugin.report import ledger
from bonn_plugin.train import Quiet, Runner

RECIPE = r"""
version: 1
name: merging_benchmark
model: {task: classification, name: bonn_wrn22_16, num_classes: 10, args: {shortcut: conv, widths: [32, 64, 128]}}
data: {name: digits, size: 8, pad: 1}
training:
  epochs: 20
  batch_size: 64
  optimizer: {name: adam, lr: 1e-2}
  schedule: {name: cosine, warmup_epochs: 2}
modifiers:
  - {type: binarize, targets: ['re:layer[1-3]\.\d\.conv[12]'], expect: 18}
"""
WINDOW = "start: 2, end: 6"
LEARNED, DROPPED, UNMERGED = "learned merging", "smallest norm dropped in training", "unmerged"


class NormDropConfig(WindowConfig):
    """Settings of ``norm_drop``: the share of filters that filter_merge would keep at equal bits."""

    type: Literal["norm_drop"] = "norm_drop"
    keep: float


@register_modifier("norm_drop", NormDropConfig)
class NormDrop(Modifier[NormDropConfig]):
    """Zeroes the outputs of the filters of smallest norm when its window opens; the training goes on without them."""

    def prepare(self, model: nn.Module, context: Any) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, BinaryConv2d)]

    def on_epoch_begin(self) -> None:
        if self.clock.epoch == self.config.start:
            for layer in self.layers:
                drop(layer, self.config.keep)


def drop(layer: BinaryConv2d, keep: float) -> None:
    """Zero the outputs of the filters of smallest norm; as many stay as fit in the bits of merged filters."""
    filters = layer.geometry.out_channels
    groups = group_count(filters, keep)
    n = layer.weight[0].numel()
    bits = groups * n + filters * (groups - 1).bit_length()
    stay = min(filters, -(-(bits - filters) // n))  # one bit an output says whether it is kept; rounded up
    merge = FilterMerge(filters, filters, 1e-3)
    merge.kept = torch.zeros(filters, dtype=torch.bool)
    merge.kept[layer.weight.detach().flatten(1).norm(dim=1).topk(stay).indices] = True
    merge.zeroed = True
    layer.merge = merge
    merge.log_sigma.requires_grad_(False)


def merge_once(layer: BinaryConv2d, keep: float) -> None:
    """Replace each filter by the mean of its K-means group."""
    filters = layer.geometry.out_channels
    layer.merge = FilterMerge(filters, filters, 1e-3)
    layer.merge.set_groups(group_filters(layer.weight, keep, 0))
    layer.merge.gamma = 1.0


@torch.no_grad()
def reestimate_norms(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Gather the batch norms' statistics anew over the training set."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    for images, _ in batches:
        model(images)


def train(modifier: str, seed: int, folder: Path) -> Runner:
    recipe = parse_recipe(RECIPE + (f"  - {modifier}\n" if modifier else ""), overrides=[f"training.seed={seed}"])
    runner = Runner(recipe, folder, torch.device("cpu"), Quiet())
    runner.train(resume=(folder / "training" / "state.pt").exists())
    return runner


def bits(runner: Runner) -> int:
    """Bits of 1-bit filters and their index."""
    book = ledger(runner.session.convert())
    return book.bits(Role.BINARY_WEIGHT) + book.bits(Role.INDEX)


def packed_accuracy(runner: Runner) -> float:
    return runner.task.measure(runner.session.convert(), torch.device("cpu"))["test_top1"]


def after_training(runner: Runner, keeps: list[float]) -> Iterator[tuple[str, float, float, int]]:
    """Yield (row, keep, top-1, bits) of what is done to a trained network without training on."""
    trained = copy.deepcopy(runner.model.state_dict())
    layers = [m for m in runner.model.modules() if isinstance(m, BinaryConv2d)]
    momentum = {m: m.momentum for m in runner.model.modules() if isinstance(m, nn.BatchNorm2d)}
    for keep in keeps:
        for row, change in (("K-means after training", merge_once), ("smallest norm dropped after training", drop)):
            for layer in layers:
                change(layer, keep)
            yield row, keep, packed_accuracy(runner), bits(runner)
            reestimate_norms(runner.model, runner.task.loader)
            yield f"{row}, norms re-estimated", keep, packed_accuracy(runner), bits(runner)
            for layer in layers:
                layer.merge = None
            runner.model.load_state_dict(trained)
            for module, value in momentum.items():
                module.momentum = value


def measure(out: Path, seeds: int, keeps: list[float]) -> None:
    results = out / "results.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    done = {(r["row"], r["keep"], r["seed"]) for r in read(results)}

    def note(row: str, keep: float, seed: int, top1: float, stored: int) -> None:
        done.add((row, keep, seed))
        record = {"row": row, "keep": keep, "seed": seed, "top1": top1, "bits": stored}
        with results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(record, flush=True)

    def train_on(seed: int, keep: float, row: str) -> None:
        if (row, keep, seed) not in done:
            kind = "filter_merge" if row == LEARNED else "norm_drop"
            runner = train(f"{{type: {kind}, keep: {keep}, {WINDOW}}}", seed, out / f"{kind}-{keep}-{seed}")
            note(row, keep, seed, packed_accuracy(runner), bits(runner))

    for seed in range(seeds):
        if (UNMERGED, 1.0, seed) not in done:
            runner = train("", seed, out / f"unmerged-{seed}")
            note(UNMERGED, 1.0, seed, packed_accuracy(runner), bits(runner))
            for row, keep, top1, stored in after_training(runner, keeps):
                note(row, keep, seed, top1, stored)
        train_on(seed, keeps[0], LEARNED)
    for keep in keeps:
        for row in (DROPPED, LEARNED):
            for seed in range(seeds):
                train_on(seed, keep, row)


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def table(out: Path) -> str:
    """Return the table in Markdown: means, standard deviations, and differences paired by seed."""
    records = read(out / "results.jsonl")
    values: dict[tuple[float, str], dict[int, float]] = {}
    stored: dict[tuple[float, str], int] = {}
    for r in records:
        key = (-r["keep"], r["row"])
        values.setdefault(key, {})[r["seed"]] = r["top1"]
        stored[key] = r["bits"]
    lines = [
        "| keep | filters | seeds | top-1, % | std | learned minus this | std | bits of filters and index |",
        "| --: | --- | --: | --: | --: | --: | --: | --: |",
    ]
    for (keep, row), by_seed in sorted(values.items()):
        top = list(by_seed.values())
        spread = f"{statistics.stdev(top):.2f}" if len(top) > 1 else ""
        # the unmerged network is compared with each share, the others with their own
        compared = [-keep] if keep > -1 else sorted({-k for k, name in values if name == LEARNED}, reverse=True)
        for other in compared:
            learned = values.get((-other, LEARNED), {})
            paired = [learned[s] - by_seed[s] for s in by_seed if s in learned]
            difference = ("", "")
            if row != LEARNED and len(paired) > 1:
                of = f"keep {other:g}: " if keep == -1 else ""
                difference = (f"{of}{statistics.mean(paired):+.2f}", f"{statistics.stdev(paired):.2f}")
            cells = (f"{-keep:g}", row, len(top), f"{statistics.mean(top):.2f}", spread, *difference)
            lines.append("| " + " | ".join(map(str, cells)) + f" | {stored[keep, row]:,} |")
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return "\n".join([*lines, "", f"{machine}, {datetime.now(UTC):%Y-%m-%d}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/merging"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--table", action="store_true", help="Measure nothing; print what there is.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.table:
        measure(args.out, args.seeds, args.keeps)
    print(table(args.out))


if __name__ == "__main__":
    main()
