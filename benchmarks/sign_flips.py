"""How many signs of the latent weights change while they train, by the kernel loss and its control of docs/results.md.

    python benchmarks/sign_flips.py               # 36 epochs, seed 0: about 6 minutes on one core
    python benchmarks/sign_flips.py --seed 1

For each row: the share of all signs that an epoch changes, averaged over thirds of the training, and the share that
differs between the end of the first third and the end of the training.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).parent))

import one_mode  # noqa: F401  registers its modifier
from tables_rows import KERNEL, NONE, ONE_MODE, long, recipe_text

from bonn_plugin.nn import BinaryConv2d
from bonn_plugin.recipe import parse_recipe
from bonn_plugin.train import Runner


class Signs:
    """Keeps the signs of all latent weights after each epoch; shows nothing."""

    def __init__(self):
        self.kept = []
        self.model = None

    def line(self, text):
        pass

    def steps(self, batches, epoch, epochs, total):
        yield from batches
        signs = [m.weight.detach() >= 0 for m in self.model.modules() if isinstance(m, BinaryConv2d)]
        self.kept.append(torch.cat([s.flatten() for s in signs]))


def changed(a, b):
    return 100 * (a != b).double().mean().item()


def measure(row, seed):
    recipe = parse_recipe(recipe_text(long(row), "digits_clutter", "."), overrides=[f"training.seed={seed}"])
    signs = Signs()
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(recipe, Path(folder), torch.device("cpu"), signs)
        signs.model = runner.model
        runner.train(resume=False)
    kept = signs.kept
    each = [changed(a, b) for a, b in pairwise(kept)]
    third = len(kept) // 3
    thirds = [mean(each[: third - 1]), mean(each[third - 1 : 2 * third - 1]), mean(each[2 * third - 1 :])]
    return [*thirds, changed(kept[third - 1], kept[-1])]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| signs that change, % | an epoch, 1st third | 2nd | 3rd | from the 1st third's end to the last |")
    print("| --- | --: | --: | --: | --: |")
    for row in (NONE, KERNEL, ONE_MODE):
        print(f"| {row.name} | {' | '.join(f'{x:.2f}' for x in measure(row, args.seed))} |", flush=True)


if __name__ == "__main__":
    main()
