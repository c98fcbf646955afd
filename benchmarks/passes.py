"""What the passes on the real-valued rest cost and save on digits: one training a seed, converted in every way.

    python benchmarks/passes.py --out runs/passes             # 5 seeds, about a quarter of an hour on one core
    python benchmarks/passes.py --out runs/passes --runs runs/merging/unmerged-*     # finished runs, not trained again
    python benchmarks/passes.py --out runs/passes --table     # the table of what has been measured so far

The network, its schedule and its seeds are the quickstart's, recipes/digits_wrn22_16.yaml. Each conversion is saved
and reloaded from its files, and measured on the whole test set. A finished seed is a line a conversion in
OUT/results.jsonl, and is not run again; OUT/passes.md is the table.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bonn_plugin import ledger, load_packed, load_recipe, parse_recipe, save_packed
from bonn_plugin.checkpoint import WEIGHTS, load_state
from bonn_plugin.recipe import Recipe, recipe_model
from bonn_plugin.report import Rule, float32_file_bytes
from bonn_plugin.session import Session
from bonn_plugin.train import Quiet, Runner
from bonn_plugin.train.tasks import make_task

RECIPE = Path(__file__).parent.parent / "recipes" / "digits_wrn22_16.yaml"
REST = r"targets: [conv1, 're:layer[23]\.0\.shortcut', fc], expect: 4"
FLOAT, INT8 = "float32 rest", "int8 rest"
WAYS: dict[str, tuple[str, ...]] = {
    FLOAT: (),
    INT8: (f"{{type: inc_int8, {REST}}}",),
    "dynamic int8 rest": (f"{{type: inc_dynamic_int8, {REST}}}",),
    "float16 rest": (f"{{type: inc_half, {REST}}}",),
    "bfloat16 rest": (f"{{type: inc_half, dtype: bfloat16, {REST}}}",),
    "int8 weights of the classifier": ("{type: inc_weight_only, targets: [fc], group_size: -1}",),
    "int4 weights of the classifier": ("{type: inc_weight_only, targets: [fc], bits: 4, group_size: 32}",),
    "int8 convolutions, int4 classifier": (
        r"{type: inc_int8, targets: [conv1, 're:layer[23]\.0\.shortcut'], expect: 3}",
        "{type: inc_weight_only, targets: [fc], bits: 4, group_size: 32}",
    ),
}
ALLOWED = 0.3
"""Points of accuracy that the int8 rest may cost in the mean."""


def main() -> None:
    """Run what is missing, write the table, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes of the recipe")
    parser.add_argument("--runs", type=Path, nargs="+", help="folders of finished runs to convert instead of training")
    parser.add_argument("--table", action="store_true", help="only print what has been measured")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    if not args.table:
        torch.set_num_threads(1)
        for recipe, run in runs(args):
            seed = recipe.training.seed
            if any((row["recipe"], row["seed"]) == (recipe.name, seed) for row in rows):
                continue
            found = measure(recipe, run, args.out / recipe.name / f"seed{seed}", given=bool(args.runs))
            with results.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
            rows += found
            print(json.dumps(found), flush=True)
    text = "\n".join(table(name, [row for row in rows if row["recipe"] == name]) for name in names(rows))
    (args.out / "passes.md").write_text(text)
    print(text)


def runs(args: argparse.Namespace) -> Iterator[tuple[Recipe, Path]]:
    """Each recipe with the folder of its run, finished or not."""
    if args.runs:
        for run in args.runs:
            yield load_recipe(run / "training" / "recipe.yaml"), run
    else:
        for seed in range(args.seeds):
            recipe = load_recipe(RECIPE, [f"training.seed={seed}", *args.set])
            yield recipe, args.out / recipe.name / f"seed{seed}" / "training"


def names(rows: list[dict[str, Any]]) -> list[str]:
    """The recipes that were measured, the quickstart's first."""
    return sorted({row["recipe"] for row in rows}, key=lambda name: (name != RECIPE.stem, name))


def measure(recipe: Recipe, run: Path, folder: Path, *, given: bool) -> list[dict[str, Any]]:
    """Train once, or take a given run's weights, and convert in every way."""
    cpu = torch.device("cpu")
    state = run / "training" / "state.pt"
    if given:
        task = make_task(recipe)
        trained = Session(recipe, 1).prepare(task.build())
        trained.load_state_dict(load_state(state)["model"])
    else:
        runner = Runner(recipe, run, cpu, Quiet())
        runner.train(resume=state.exists())
        task, trained = runner.task, runner.model
    trained.eval()
    rows = []
    for name, modifiers in WAYS.items():
        changed = with_modifiers(recipe, modifiers)
        session = Session(changed, 1)
        session.prepare(recipe_model(changed)).load_state_dict(trained.state_dict())
        place = folder / name.replace(" ", "_").replace(",", "")
        save_packed(session.convert(task.calibration), place, changed)
        packed = load_packed(place)
        book = ledger(packed)
        size = (place / WEIGHTS).stat().st_size
        rows.append(
            {
                "recipe": recipe.name,
                "seed": recipe.training.seed,
                "samples": task.sizes[1],
                "way": name,
                "top1": task.measure(packed, cpu)["test_top1"],
                "trained": task.measure(trained, cpu)["test_top1"],
                "bits": sum(entry.needed_bits for entry in book.entries),
                "rate": book.rate(Rule.PARAMETERS),
                "rate_with_scales": book.rate(Rule.WITH_SCALES),
                "bytes": size,
                "rate_by_bytes": float32_file_bytes(recipe_model(changed)) / size,
            }
        )
    return rows


def with_modifiers(recipe: Recipe, modifiers: Iterable[str]) -> Recipe:
    """Return the recipe with more modifiers at the end of its list."""
    from bonn_plugin.recipe import dump_recipe

    text = dump_recipe(recipe).rstrip("\n")
    return parse_recipe(text + "".join(f"\n- {modifier}" for modifier in modifiers) + "\n")


def table(name: str, rows: list[dict[str, Any]]) -> str:
    """Return the table of one recipe as Markdown."""
    by_way = {way: {row["seed"]: row for row in rows if row["way"] == way} for way in WAYS}
    plain = by_way[FLOAT]
    samples = rows[0]["samples"]
    lines = [
        f"# Passes on the real-valued rest: {name}",
        "",
        f"`python benchmarks/passes.py`: {len(plain)} seeds, one training each; {platform.machine()}, "
        f"1 thread, torch {torch.__version__.split('+')[0]}, {datetime.now(UTC):%Y-%m-%d}. "
        f"Accuracy on the {samples} test images, reloaded from the files; one image is {100 / samples:.2f} points.",
        "",
        "| rest | top-1, % | against float32, points | stored bits | rate | with scales | file bytes | rate by bytes |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for way, found in by_way.items():
        if not found:
            continue
        accuracies = [row["top1"] for row in found.values()]
        lost = [row["top1"] - plain[seed]["top1"] for seed, row in found.items()]
        some = next(iter(found.values()))
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        lines.append(
            f"| {way} | {statistics.mean(accuracies):.2f}{spread} | {statistics.mean(lost):+.2f} "
            f"({min(lost):+.2f} to {max(lost):+.2f}) | {some['bits']:,} | {some['rate']:.2f} | "
            f"{some['rate_with_scales']:.2f} | {some['bytes']:,} | {some['rate_by_bytes']:.2f} |"
        )
    if by_way[INT8]:
        cost = -statistics.mean(row["top1"] - plain[seed]["top1"] for seed, row in by_way[INT8].items())
        holds = "holds" if cost <= ALLOWED else "MISSES"
        lines += ["", f"The int8 rest costs {cost:.2f} points in the mean; {ALLOWED} are allowed: {holds}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
