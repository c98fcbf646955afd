"""Broken recipes and checkpoints in great numbers: no crash, no hang, no wrong logits.

A recipe must give a Recipe or a RecipeError in under a second, a checkpoint a CheckpointError or the logits it had.

    python benchmarks/fuzz.py --recipes 100000 --checkpoints 10000
"""

from __future__ import annotations

import argparse
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from bonn_plugin import Session, parse_recipe, save_packed  # noqa: E402
from bonn_plugin.recipe import Recipe, recipe_model  # noqa: E402
from bonn_plugin.shipped import shipped_recipes  # noqa: E402
from tests.conftest import TINY  # noqa: E402
from tests.fuzzing import BrokenCheckpoints, broken_recipe, parsed  # noqa: E402


def resident():
    """Return MiB that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def recipes(count, seed):
    whole = [path.read_text() for path in shipped_recipes().values()] + [TINY]
    found, slowest, crashed, before, most = Counter(), (0.0, ""), [], resident(), 0.0
    for i in range(count):
        text = broken_recipe(random.Random(f"{seed}/{i}"), whole)
        # processor time: another program on the machine is not the recipe's fault
        began = time.process_time()
        try:
            found["recipe" if isinstance(parsed(text), Recipe) else "RecipeError"] += 1
        except BaseException as error:
            crashed.append((i, repr(error)[:200]))
        slowest = max(slowest, (time.process_time() - began, i))
        most = max(most, resident() - before)
    print(
        f"{count:,} recipes: {dict(found)}, {len(crashed)} crashes; slowest {slowest[0]:.2f} s of processor time "
        f"(number {slowest[1]}), at most {most:.0f} MiB more than at the start"
    )
    for crash in crashed[:20]:
        print("crash", *crash)


def checkpoints(count, seed):
    with tempfile.TemporaryDirectory() as place:
        recipe = parse_recipe(TINY)
        torch.manual_seed(0)
        session = Session(recipe, 1)
        session.prepare(recipe_model(recipe))
        save_packed(session.convert(), Path(place) / "whole", recipe)
        broken = BrokenCheckpoints(Path(place) / "whole", Path(place))
        broken.files.append("recipe.yaml")
        found, slowest, crashed, before, most = Counter(), (0.0, 0), [], resident(), 0.0
        for i in range(count):
            began = time.process_time()
            try:
                found[broken.attempt(random.Random(f"{seed}/{i}"))] += 1
            except Exception as error:
                crashed.append((i, repr(error)[:200]))
            slowest = max(slowest, (time.process_time() - began, i))
            most = max(most, resident() - before)
    print(
        f"{count:,} checkpoints: {dict(found)}, {len(crashed)} crashes; slowest {slowest[0]:.2f} s of processor time, "
        f"at most {most:.0f} MiB more than at the start"
    )
    for crash in crashed[:20]:
        print("crash", *crash)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=int, default=100_000)
    parser.add_argument("--checkpoints", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, 1 thread, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}, seed {args.seed}")
    if args.recipes:
        recipes(args.recipes, args.seed)
    if args.checkpoints:
        checkpoints(args.checkpoints, args.seed)


if __name__ == "__main__":
    main()
