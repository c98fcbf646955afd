"""What it costs to let w fall below zero: BONN with and without the floor of w, by the learning rate of w.

    python benchmarks/modulation_floor.py --seeds 5    # about 15 minutes on one core

On digits_clutter, the row "BONN, no Bayesian loss" of benchmarks/tables.py: ResNet18 of a quarter of the width, 12
epochs, Adam 2e-2. Prints a Markdown table; p is of a paired t-test over the seeds, against the floor at the same rate.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev
from unittest.mock import patch

import torch
from scipy.stats import ttest_rel

sys.path.insert(0, str(Path(__file__).parent))

from tables_rows import NONE, recipe_text

from bonn_plugin.nn import BinaryConv2d
from bonn_plugin.recipe import parse_recipe
from bonn_plugin.train import Quiet, Runner

RATES = ("2e-4", "2e-2")


def run(rate, floor, seed):
    """Return the accuracy and the share of w below zero, both in %."""
    overrides = [f"training.optimizer.lr_by_role={{modulation: {rate}}}", f"training.seed={seed}"]
    recipe = parse_recipe(recipe_text(NONE, "digits_clutter", "."), overrides=overrides)
    device = torch.device("cpu")
    without = nullcontext() if floor else patch.object(BinaryConv2d, "after_step", lambda layer: None)
    with tempfile.TemporaryDirectory() as folder, without:
        runner = Runner(recipe, Path(folder), device, Quiet())
        runner.train(resume=False)
        w = [m.modulation.detach().flatten() for m in runner.model.modules() if isinstance(m, BinaryConv2d)]
        below = (torch.cat(w) < 0).double().mean().item()
        return runner.task.measure(runner.model, device)["test_top1"], 100 * below


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rates", nargs="*", default=list(RATES), help="learning rates of w")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for rate in args.rates:
        tops = {}
        for floor in (True, False):
            runs = [run(rate, floor, seed) for seed in range(args.seeds)]
            tops[floor] = [top for top, _ in runs]
            print(f"rate {rate}, floor {floor}: {runs}", flush=True)
            differ = args.seeds > 1 and tops[True] != tops[floor]
            p = f"{ttest_rel(tops[True], tops[floor]).pvalue:.3f}" if differ else ""
            spread = f" ± {stdev(tops[floor]):.2f}" if args.seeds > 1 else ""
            below = mean(share for _, share in runs)
            kept = "yes" if floor else "no"
            lines.append(f"| {rate} | {kept} | {mean(tops[floor]):.2f}{spread} | {below:.0f} | {p} |")
    when = f"{datetime.now(UTC):%Y-%m-%d}"
    print(f"\n{platform.machine()}, 1 thread, torch {torch.__version__}, {when}, {args.seeds} seeds")
    print("\n| learning rate of w | kept positive | top-1, % | w below zero at the end, % | p |")
    print("| --- | --- | --: | --: | --: |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
