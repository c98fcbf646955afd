"""Training in two steps with a teacher against training in one, on digits with 10 training images a class.

Three trainings a seed: full precision (the teacher), 1-bit in one step, and 1-bit in two steps from the teacher, of as
many epochs. The seed chooses the training images too; the test set is always the same 450 images, and is looked at
once, by the packed checkpoint.

    python benchmarks/two_step.py --seeds 5          # writes benchmarks/two_step.md
    python benchmarks/two_step.py --search           # other settings, on other seeds: what the recipes were chosen from
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
import zlib
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev

import torch

from bonn_plugin import load_recipe
from bonn_plugin.recipe import dump_recipe
from bonn_plugin.report import Report
from bonn_plugin.shipped import find_recipe
from bonn_plugin.train import STATE, Quiet, Runner, earlier_runs

TEACHER, ONE, FIRST, TWO = "digits_few_teacher", "digits_few", "digits_few_two_step_first", "digits_few_two_step"
RATE, T = "training.optimizer.lr=", "modifiers.distill.temperature="
NO_LABELS, SCRATCH = "modifiers.distill.task_weight=0", "model={name: bonn_wrn22_16, num_classes: 10}"

ARMS = {
    "full precision": (TEACHER, {}),
    "1-bit, one step": (ONE, {}),
    "1-bit, two steps, teacher": (TWO, {}),
}
SEARCHED = {
    "one step, rate 3e-3": (ONE, {ONE: [RATE + "3e-3"]}),
    "one step, rate 1e-2 (the recipe)": (ONE, {}),
    "one step, rate 2e-2": (ONE, {ONE: [RATE + "2e-2"]}),
    "two steps (the recipes)": (TWO, {}),
    "two steps, no labels, temperature 1": (TWO, {FIRST: [T + "1", NO_LABELS], TWO: [T + "1", NO_LABELS]}),
    "two steps, no labels, first rate 3e-3": (TWO, {FIRST: [NO_LABELS, RATE + "3e-3"], TWO: [NO_LABELS]}),
    "two steps from scratch, no labels, temperature 1": (
        TWO,
        {FIRST: [SCRATCH, T + "1", NO_LABELS], TWO: [T + "1", NO_LABELS]},
    ),
}
"""Which recipe, and what is changed in which recipe of its chain."""


def run(recipe, folder):
    """Train one recipe in its folder and return the top-1 of its packed checkpoint, in percent."""
    runner = Runner(recipe, folder, torch.device("cpu"), Quiet())
    runner.task.measure = lambda model, device: {"test_top1": math.nan, "test_top5": math.nan}
    runner.train(resume=(folder / STATE).exists())
    accuracy = runner.finish().report.accuracy
    assert accuracy is not None
    assert accuracy.identical_logits
    return accuracy.packed_top1


def measure(folder, seed, arm):
    """Return the top-1 of one arm; runs that several arms need are trained once."""
    last, changes = arm
    place = folder / f"seed{seed}-{zlib.crc32(json.dumps(changes).encode()):08x}"
    place.mkdir(exist_ok=True, parents=True)
    for name in (TEACHER, ONE, FIRST, TWO):
        overrides = [*changes.get(name, []), f"training.seed={seed}", f"data.subset_seed={seed}"]
        (place / f"{name}.yaml").write_text(dump_recipe(load_recipe(find_recipe(name), overrides)))
    teacher = folder / f"teacher{seed}"
    if teacher.exists() and not (place / "runs").exists():
        (place / "runs").mkdir()
        (place / "runs" / TEACHER).symlink_to(teacher, target_is_directory=True)
    recipe = load_recipe(place / f"{last}.yaml")
    target = place / "runs" / last
    if (target / "report.json").exists():
        accuracy = Report.model_validate_json((target / "report.json").read_bytes()).accuracy
        assert accuracy is not None
        return accuracy.packed_top1
    if last == TEACHER:
        top1 = run(recipe, target)
        target.rename(teacher)
        target.symlink_to(teacher, target_is_directory=True)
        return top1
    for earlier in earlier_runs(recipe, target):
        if not earlier.finished:
            run(earlier.recipe, earlier.folder)
    return run(recipe, target)


def table(results):
    """Return the Markdown table of top-1 by arm and seed."""
    seeds = range(len(next(iter(results.values()))))
    lines = [
        "| | mean | std | " + " | ".join(f"seed {s}" for s in seeds) + " |",
        "| --- " + "| --: " * (len(seeds) + 2) + "|",
    ]
    for name, values in results.items():
        lines.append(
            f"| {name} | {mean(values):.2f} | {stdev(values):.2f} | " + " | ".join(f"{v:.2f}" for v in values) + " |"
        )
    return lines


def paired(results, arm, against):
    """Return one line on the difference between two arms, seed by seed."""
    gains = [a - b for a, b in zip(results[arm], results[against], strict=True)]
    error = stdev(gains) / math.sqrt(len(gains))
    each = ", ".join(f"{gain:+.2f}" for gain in gains)
    return f"- {arm} minus {against}: {mean(gains):+.2f} points, standard error {error:.2f} ({each})"


def compare(folder, count, threads):
    """Measure the arms over ``count`` seeds from 0 and write two_step.md."""
    results = {}
    for name, arm in ARMS.items():
        results[name] = []
        for seed in range(count):
            results[name].append(measure(folder, seed, arm))
            print(f"{name}, seed {seed}: {results[name][-1]:.2f}", flush=True)
    Path(__file__).with_suffix(".md").write_text("\n".join(page(results, count, threads)) + "\n")


def page(results, count, threads):
    """Return the lines of two_step.md."""
    machine = f"{platform.machine()}, {threads} thread, torch {torch.__version__}"
    full, one, two = results
    return [
        "# Two steps with a teacher, on few images",
        "",
        f"`python benchmarks/two_step.py --seeds {count}`: {machine}, {datetime.now(UTC):%Y-%m-%d}.",
        "",
        "scikit-learn's digits at 8 x 8 pixels with 10 training images a class; WRN22 16-16-32-64. Top-1 in % of the",
        "packed checkpoint on the same 450 test images, after training; the seed chooses weights, order",
        "and training images. Each 1-bit network trains for 160 epochs in all (80 + 80 in two steps); the teacher's",
        "own 160 epochs come on top.",
        "",
        *table(results),
        "",
        "Differences seed by seed:",
        "",
        paired(results, two, one),
        paired(results, two, full),
        "",
        "What each part gives (starting from the teacher's weights, its logits, the two steps) is not told apart here.",
        "",
        "Settings were chosen on other seeds: the rate of one step out of three on 100 and 101, two steps out of ten",
        "settings on 100 to 102 (`--search` repeats most of them on 100 and 101). A first choice there, two steps from",
        "scratch at temperature 1 without labels, gained 1.3 to 4.9 points on 100 to 102 and did not hold on these",
        "seeds: +4.67, -2.89, -0.44 and +0.00 on 0 to 3. Only then was the present one looked for, on 100 and 102, and",
        "measured here.",
    ]


def search(folder, seeds):
    """Print the top-1 of other settings on other seeds, as rows of a table."""
    for seed in seeds:
        measure(folder, seed, ARMS["full precision"])
    print("| | mean | " + " | ".join(f"seed {s}" for s in seeds) + " |\n| --- " + "| --: " * (len(seeds) + 1) + "|")
    for name, arm in SEARCHED.items():
        values = [measure(folder, seed, arm) for seed in seeds]
        print(f"| {name} | {mean(values):.2f} | " + " | ".join(f"{v:.2f}" for v in values) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--work", type=Path, help="where the runs go and stay: a second call goes on there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        if args.search:
            search(work, range(100, 102))
        else:
            compare(work, args.seeds, args.threads)


if __name__ == "__main__":
    main()
