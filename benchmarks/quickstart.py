"""The README's figures of the quickstart: accuracy over seeds, against full precision, and the two modes.

Runs the recipe as it is, without its kernel loss, and in full precision, each under the same schedule and over the
same seeds, and prints a Markdown table with mean and standard deviation.

    python benchmarks/quickstart.py --seeds 5
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev

import torch

from bonn_plugin import load_recipe
from bonn_plugin.nn.distribution import latent_valleys
from bonn_plugin.shipped import find_recipe
from bonn_plugin.train import Quiet, Runner

VARIANTS = {
    "1-bit, kernel loss (the recipe)": [],
    "1-bit, no kernel loss": ["modifiers=[{type: binarize}]"],
    "full precision": ["modifiers=[]"],
}


def run(recipe_name, overrides, seed):
    recipe = load_recipe(find_recipe(recipe_name), [*overrides, f"training.seed={seed}"])
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        runner = Runner(recipe, Path(folder), torch.device("cpu"), Quiet())
        runner.train(resume=False)
        valleys = latent_valleys(runner.model)
        report = runner.finish().report
        assert report.accuracy is not None
        return {
            "seed": seed,
            "trained": report.accuracy.trained_top1,
            "packed": report.accuracy.packed_top1,
            "identical": report.accuracy.identical_logits,
            "lowest_valley": min(valleys.values(), default=None),
            "highest_valley": max(valleys.values(), default=None),
            "seconds": time.perf_counter() - began,
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits_wrn22_16")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write every run to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for name in args.variants:
        results[name] = []
        for seed in range(args.seeds):
            results[name].append(run(args.recipe, VARIANTS[name], seed))
            print(f"{name}, seed {seed}: {results[name][-1]}", flush=True)
    machine = f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}"
    print(f"\n{args.recipe}, {args.seeds} seeds, {machine}, {datetime.now(UTC):%Y-%m-%d}")
    print("\n| | top-1 packed, % | per seed | valley (lowest to highest layer) | seconds a run |")
    print("| --- | --- | --- | --- | --- |")
    for name, runs in results.items():
        packed = [r["packed"] for r in runs]
        spread = stdev(packed) if len(packed) > 1 else 0.0
        valleys = "-"
        if runs[0]["lowest_valley"] is not None:
            lowest, highest = min(r["lowest_valley"] for r in runs), max(r["highest_valley"] for r in runs)
            valleys = f"{lowest:.2f} to {highest:.2f}"
        each = ", ".join(f"{p:.2f}" for p in packed)
        seconds = mean(r["seconds"] for r in runs)
        print(f"| {name} | {mean(packed):.2f} ± {spread:.2f} | {each} | {valleys} | {seconds:.0f} |")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
