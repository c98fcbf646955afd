"""The papers' tables and ablations, each method beside the others: docs/results.md.

    python benchmarks/tables.py --out runs/tables --jobs 2    # all on digits_clutter: about 20 hours of a core
    python benchmarks/tables.py --out runs/tables --only table2 --seeds 10
    python benchmarks/tables.py --out runs/tables --page docs/results.md    # what has been measured so far
    python benchmarks/tables.py --out runs/cifar --dataset cifar10 --root DATA --device cuda

Each finished training is a line in OUT/results.jsonl and is not run again; tables share the trainings that they have in
common. Of one data set all rows have one schedule, one optimizer and the same seeds: weights, order of the images.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import one_mode  # noqa: F401  registers its modifier
from tables_page import write_page
from tables_rows import SETTINGS, TABLES, Row, recipe_text

from bonn_plugin.data import classification
from bonn_plugin.errors import BonnError
from bonn_plugin.nn.distribution import latent_valleys
from bonn_plugin.recipe import parse_recipe
from bonn_plugin.train import Quiet, Runner, choose_device


def train(text, seed, device, threads):
    """Train, pack, reload; return what is known of it."""
    torch.set_num_threads(threads)
    if not hasattr(classification.digits_clutter, "cache_info"):  # the same images in each training of this process
        classification.digits_clutter = lru_cache(1)(classification.digits_clutter)
    recipe = parse_recipe(text, overrides=[f"training.seed={seed}"])
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        runner = Runner(recipe, Path(folder), torch.device(device), Quiet())
        runner.train(resume=False)
        seconds = time.perf_counter() - began
        last = json.loads((Path(folder) / "training" / "metrics.jsonl").read_text().splitlines()[-1])
        valleys = list(latent_valleys(runner.model).values())
        report = runner.finish().report
        assert report.accuracy is not None
        assert report.accuracy.identical_logits
        return {
            "top1": report.accuracy.trained_top1,
            "packed_top1": report.accuracy.packed_top1,
            "loss": last["loss"]["task"],
            "valley": sum(valleys) / len(valleys) if valleys else None,
            "rate": report.rates[0].rate,
            "ops": report.operations.ops,
            "seconds": seconds,
        }


def key_of(text, seed):
    return hashlib.sha256(f"{text}\0{seed}".encode()).hexdigest()[:16]


def finished(out):
    """Return the results so far, by key."""
    file = out / "results.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return {r["key"]: r for r in map(json.loads, lines)}


def wanted(names, rows, dataset, root, seeds) -> Iterator[tuple[str, Row, str, int]]:
    """Yield (key, row, recipe, seed) of each training, no two the same; all rows of a seed before the next seed."""
    told = set()
    for seed in range(seeds):
        for name in names:
            for row in TABLES[name].rows:
                if not re.search(rows, row.name):
                    continue
                text = recipe_text(row, dataset, root)
                key = key_of(text, seed)
                if key not in told:
                    told.add(key)
                    yield key, row, text, seed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--rows", default="", help="only rows whose name this regular expression finds")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--dataset", choices=list(SETTINGS), default="digits_clutter")
    parser.add_argument("--root", default=".", help="folder of the data set, where it needs one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each training")
    parser.add_argument("--page", type=Path, help="write the tables of what has been measured to this file and stop")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.page:
        done = finished(args.out)
        write_page(args.page, args.dataset, args.root, done, key_of)
        print(f"{args.page}: from {len(done)} trainings")
        return
    done = finished(args.out)
    todo = [t for t in wanted(args.only, args.rows, args.dataset, args.root, args.seeds) if t[0] not in done]
    machine = f"{platform.machine()}, {args.threads} thread(s) a training, torch {torch.__version__}"
    try:
        device = choose_device(args.device)
    except BonnError as error:
        parser.error(str(error))
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    print(f"{len(todo)} trainings to do, {len(done)} done; {machine}", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool, (args.out / "results.jsonl").open("a") as file:
        running = {pool.submit(train, text, seed, str(device), args.threads): (k, r, seed) for k, r, text, seed in todo}
        for i, future in enumerate(as_completed(running)):
            key, row, seed = running[future]
            try:
                found = future.result()
            except BaseException as error:
                pool.shutdown(wait=False, cancel_futures=True)
                if isinstance(error, BonnError):  # a data set that is not there
                    print(f"{row.name}, seed {seed}: {error}", file=sys.stderr)
                    raise SystemExit(2) from None
                raise
            result = {"key": key, "row": row.name, "seed": seed, **found}
            result |= {"machine": machine, "date": f"{datetime.now(UTC):%Y-%m-%d}"}
            file.write(json.dumps(result) + "\n")
            file.flush()
            print(f"{i + 1}/{len(todo)} {row.name}, seed {seed}: {result['top1']:.2f}", flush=True)


if __name__ == "__main__":
    main()
