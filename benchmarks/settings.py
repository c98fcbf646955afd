"""Behind the settings of the digits recipe and the learning rates of the CIFAR ones: what else was tried.

One seed each unless told otherwise: leads, not results.

    python benchmarks/settings.py
"""

from __future__ import annotations

import argparse
import platform
from datetime import UTC, datetime
from statistics import mean

import torch
from quickstart import run

KERNEL = "modifiers.kernel_loss."
SGD = ["training.optimizer.name=sgd", "training.optimizer.lr=0.01", "training.optimizer.weight_decay=5e-4"]
VARIANTS = {
    "the recipe: lambda 1e-4, nu 1e-2, second half": [],
    "lambda 1e-4, nu 1e-4, from the start": [KERNEL + "nu=1e-4", KERNEL + "start=0"],
    "lambda 1e-3, nu 1e-3, from the start": [KERNEL + "lambda=1e-3", KERNEL + "nu=1e-3", KERNEL + "start=0"],
    "lambda 1e-3, nu 3e-3, second half": [KERNEL + "lambda=1e-3", KERNEL + "nu=3e-3"],
    "Nesterov SGD 0.01 throughout": SGD,
    "Nesterov SGD 0.01, latent kernels 0.1": [*SGD, "training.optimizer.lr_by_role={weight: 0.1}"],
    "Nesterov SGD 0.01, latent kernels 1.0": [*SGD, "training.optimizer.lr_by_role={weight: 1.0}"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}"
    print(f"digits_wrn22_16, {args.seeds} seeds, {machine}, {datetime.now(UTC):%Y-%m-%d}\n")
    print("| | top-1, % | valley (lowest to highest layer) |\n| --- | --- | --- |")
    for name, overrides in VARIANTS.items():
        runs = [run("digits_wrn22_16", overrides, seed) for seed in range(args.seeds)]
        lowest, highest = min(r["lowest_valley"] for r in runs), max(r["highest_valley"] for r in runs)
        print(f"| {name} | {mean(r['packed'] for r in runs):.2f} | {lowest:.2f} to {highest:.2f} |", flush=True)


if __name__ == "__main__":
    main()
