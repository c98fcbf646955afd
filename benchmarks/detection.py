"""Detection: a 1-bit detector from the full-precision one, over seeds, beside full precision trained as long.

Runs recipes/digit_scenes_fcos_resnet18_real.yaml, then recipes/digit_scenes_fcos_resnet18.yaml from it, then the
first again over as many epochs as both have together. What a folder holds already is not run again, so that the
command can be given anew after an interruption.

    OMP_NUM_THREADS=1 python benchmarks/detection.py --seeds 3 --out runs/detection
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev

import torch

from bonn_plugin import Recipe, load_recipe
from bonn_plugin.report import Report, Rule
from bonn_plugin.shipped import find_recipe
from bonn_plugin.train import METRICS, STATE, Runner

REAL, BINARY = "digit_scenes_fcos_resnet18_real", "digit_scenes_fcos_resnet18"
LONGER = f"{REAL}_longer"


class Lines:
    """A progress that prints its lines."""

    def line(self, text):
        print(text, flush=True)

    def steps(self, batches, epoch, epochs, total):
        return batches


def finished(recipe: Recipe, folder: Path) -> Report:
    """Return the report of a run, which is trained or gone on with where it is not there."""
    if not (folder / "report.json").exists():
        runner = Runner(recipe, folder, torch.device("cpu"), Lines())
        runner.train(resume=(folder / STATE).exists())
        runner.finish()
    return Report.model_validate_json((folder / "report.json").read_bytes())


def row(name: str, epochs: str, reports: list[Report], folders: list[Path]) -> str:
    def cell(values: list[float]) -> str:
        return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"

    found = [report.accuracy for report in reports]
    records = [[json.loads(line) for line in (folder / METRICS).read_text().splitlines()] for folder in folders]
    minutes = mean(sum(record["seconds"] for record in run) for run in records) / 60
    cells = [cell([getattr(one, f"packed_map{kind}") for one in found]) for kind in ("", "50", "75")]
    each = ", ".join(f"{one.packed_map:.3f}" for one in found)
    rates = [reports[0].part.rates, reports[0].rates]
    rate = [next(f"{r.rate:.2f}" for r in rows if r.rule is Rule.PARAMETERS) for rows in rates]
    same = "yes" if all(one.identical_detections for one in found) else "no"
    return "| " + " | ".join([name, epochs, str(len(found)), *cells, each, *rate, same, f"{minutes:.1f}"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/detection"))
    parser.add_argument("--without-longer", action="store_true", help="leave out full precision trained as long")
    args = parser.parse_args()
    runs: dict[str, list[tuple[Report, Path]]] = {REAL: [], BINARY: [], LONGER: []}
    epochs = {name: load_recipe(find_recipe(name)).training.epochs for name in (REAL, BINARY)}
    for seed in range(args.seeds):
        for name, changes in (
            (REAL, []),
            (BINARY, []),
            (LONGER, [f"training.epochs={epochs[REAL] + epochs[BINARY]}", f"name={LONGER}"]),
        ):
            if name == LONGER and args.without_longer:
                continue
            folder = args.out / f"seed{seed}" / name
            file = find_recipe(REAL if name == LONGER else name)
            runs[name].append((finished(load_recipe(file, [f"training.seed={seed}", *changes]), folder), folder))
    titles = {
        REAL: ("full precision, the first stage", str(epochs[REAL])),
        BINARY: ("1-bit, from the first stage", f"{epochs[REAL]} + {epochs[BINARY]}"),
        LONGER: ("full precision, trained as long", str(epochs[REAL] + epochs[BINARY])),
    }
    head = ["detector", "epochs", "seeds", "mAP", "mAP50", "mAP75", "mAP by seed", "rate of the backbone", "of all"]
    print("\n| " + " | ".join([*head, "reloaded equal", "minutes of the stage"]) + " |")
    print("| --- | --- | --: | --- | --- | --- | --- | --: | --: | --- | --: |")
    for name, found in runs.items():
        if found:
            print(row(*titles[name], [report for report, _ in found], [folder for _, folder in found]))
    threads = torch.get_num_threads()
    print(f"\n{platform.machine()}, {threads} threads, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}")


if __name__ == "__main__":
    main()
