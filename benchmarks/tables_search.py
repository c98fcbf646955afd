"""What was tried for the settings of benchmarks/tables.py and beside them: leads of one or two seeds.

    python benchmarks/tables_search.py --out runs/search.jsonl          # about three hours on one core
    python benchmarks/tables_search.py --out runs/search.jsonl --table  # what has been measured so far

Each line is on digits_clutter, ResNet18 of a quarter of the width, 12 epochs, batch 64, Adam with cosine and one epoch
of warm-up, but where it says otherwise. w stands for the modulation vector, whose learning rate is a role of its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import torch

from bonn_plugin.recipe import parse_recipe
from bonn_plugin.train import Quiet, Runner

RECIPE = """
version: 1
name: search
model: {name: bonn_resnet18, num_classes: 10, args: {widths: [16, 32, 64, 128], shortcut: SHORTCUT, norm: NORM}}
data: {name: digits_clutter}
training:
  epochs: 12
  batch_size: 64
  optimizer: {name: adam, lr: 5e-3}
  schedule: {name: cosine, warmup_epochs: 1}
modifiers: []
"""
SIGNS = "{type: binarize, threshold: never"
BONN = f"{SIGNS}}}"
SGD = "training.optimizer={name: sgd, lr: 0.1, momentum: 0.9, lr_by_role: {weight: 1.0, modulation: 0.01ROLES}}"
FEW = ("training.epochs=48", "training.schedule.warmup_epochs=3", "data.train=1000")


def kernel(lam, nu, start=0):
    return f"{BONN}, {{type: kernel_loss, lambda: {lam}, nu: {nu}, start: {start}}}"


def feature(theta, start=8):
    return f"{BONN}, {{type: feature_loss, theta: {theta}, start: {start}}}"


def rates(w, sigma=None):
    more = "" if sigma is None else f", sigma: {sigma}"
    return f"training.optimizer.lr_by_role={{modulation: {w}{more}}}"


def method(name):
    return f"{SIGNS}, method: {name}}}"


def lr(value):
    return f"training.optimizer.lr={value}"


def tried() -> Iterator[tuple[str, str, str, str, tuple[str, ...], tuple[int, ...]]]:
    """Yield (name, shortcut, norm, modifiers, overrides, seeds)."""
    two, one = (0, 1), (100,)
    yield "no loss", "conv", "before", BONN, (rates("5e-5"),), two
    yield "lambda 1e-4, nu 1e-3, w at 5e-3", "conv", "before", kernel("1e-4", "1e-3"), (), two
    yield "lambda 1e-4, nu 1e-3, w at 5e-4", "conv", "before", kernel("1e-4", "1e-3"), (rates("5e-4", "5e-4"),), two
    yield "lambda 1e-4, nu 1e-3, w at 5e-5", "conv", "before", kernel("1e-4", "1e-3"), (rates("5e-5", "5e-4"),), two
    yield "lambda 1e-4, nu 1e-2, w at 5e-5", "conv", "before", kernel("1e-4", "1e-2"), (rates("5e-5", "5e-4"),), (0,)
    yield "SGD, no loss", "conv", "before", BONN, (SGD.replace("ROLES", ""),), two
    for lam, nu in (("1e-4", "1e-3"), ("1e-4", "1e-2")):
        overrides = (SGD.replace("ROLES", ", sigma: 0.01"),)
        yield f"SGD, lambda {lam}, nu {nu}", "conv", "before", kernel(lam, nu), overrides, two
    yield "no loss", "block", "before", BONN, (rates("5e-5"),), two
    for nu in ("1e-3", "1e-2"):
        yield f"lambda 1e-4, nu {nu}", "block", "before", kernel("1e-4", nu), (rates("5e-5", "5e-4"),), two
    for theta in ("1e-3", "1e-2"):
        yield f"theta {theta}", "block", "before", feature(theta), (rates("5e-5"),), two
    few = (*FEW, rates("5e-5"))
    yield "1,000 images, 48 epochs, no loss", "conv", "before", BONN, few, two
    few = (*FEW, rates("5e-5", "5e-4"))
    yield "1,000 images, 48 epochs, lambda 1e-4, nu 1e-3", "conv", "before", kernel("1e-4", "1e-3"), few, two
    for shortcut in ("block", "conv"):
        yield "BNN", shortcut, "before", method("bnn"), (), (0,)
        yield "XNOR-Net", shortcut, "before", method("xnor"), (), (0,)
        yield "XNOR-Net without K", shortcut, "before", method("xnor, input_scale: false"), (), (0,)
    for rate in ("1e-3", "2e-3", "1e-2", "2e-2"):
        yield f"Bi-Real Net, learning rate {rate}", "conv", "after", method("bireal"), (lr(rate),), one
    yield "BNN, learning rate 1e-2", "block", "after", method("bnn"), (lr("1e-2"),), one
    yield "BNN, learning rate 2e-2", "block", "after", method("bnn"), (lr("2e-2"),), one
    yield "no loss, learning rate 1e-2", "conv", "before", BONN, (lr("1e-2"), rates("1e-4")), one
    yield "no loss, learning rate 1e-2", "block", "before", BONN, (lr("1e-2"), rates("1e-4")), one
    yield "no loss, learning rate 1e-2", "block", "after", BONN, (lr("1e-2"), rates("1e-4")), one
    yield "no loss, learning rate 2e-2", "block", "after", BONN, (lr("2e-2"), rates("2e-4")), one
    many = (lr("2e-2"), rates("2e-4", "2e-3"))
    yield "lambda 1e-4, nu 1e-3, learning rate 2e-2", "block", "after", kernel("1e-4", "1e-3"), many, one
    plain = many[:1]
    free = (*plain, rates("2e-4"))  # without the kernel loss there is no sigma
    learned = "{type: binarize, threshold: always}"
    yield "no loss, learning rate 2e-2", "conv", "after", BONN, free, one
    yield "no loss, learning rate 2e-2, learned thresholds", "conv", "after", learned, free, one
    for bound in ("0.5", "2"):
        wider = f"{SIGNS}, bound: {bound}}}"
        yield f"no loss, learning rate 2e-2, gradient of the sign within {bound}", "conv", "after", wider, free, one
    polynomial = f"{SIGNS}, ste: polynomial}}"
    yield "no loss, learning rate 2e-2, Bi-Real's gradient of the sign", "conv", "after", polynomial, free, one
    clipped = method("bireal, ste: clip")
    yield "Bi-Real Net, learning rate 2e-2, clipped gradient of the sign", "conv", "after", clipped, plain, one
    yield "Bi-Real Net, learning rate 5e-2", "conv", "after", method("bireal"), (lr("5e-2"),), one
    for shortcut in ("conv", "block"):
        for norm in ("after", "before"):
            yield "full precision, learning rate 2e-2", shortcut, norm, "", plain, one
    three = "training.epochs=36"
    yield "36 epochs, no loss", "conv", "after", BONN, (*free, three), one
    yield "36 epochs, Bi-Real Net", "conv", "after", method("bireal"), (*plain, three), one
    both = f"{kernel('1e-4', '1e-3')}, {{type: feature_loss, theta: 1e-3, start: 40}}"
    for epochs, name, modifiers, overrides in (
        (48, "no loss", BONN, free),
        (48, "lambda 1e-4, nu 1e-3", kernel("1e-4", "1e-3"), many),
        (48, "lambda 1e-4, nu 1e-2", kernel("1e-4", "1e-2"), many),
        (48, "lambda 1e-4, nu 1e-2 from the middle on", kernel("1e-4", "1e-2", 24), many),
        (48, "lambda 1e-3, nu 1e-3", kernel("1e-3", "1e-3"), many),
        (48, "theta 1e-3", feature("1e-3", 32), free),
        (48, "theta 1e-2", feature("1e-2", 32), free),
        (48, "Bi-Real Net", method("bireal"), plain),
        (60, "no loss", BONN, free),
        (60, "both losses", both, many),
        (60, "XNOR-Net", method("xnor"), plain),
        (60, "full precision", "", plain),
    ):
        yield f"{epochs} epochs, {name}", "block", "after", modifiers, (f"training.epochs={epochs}", *overrides), one
    wide = ("training.epochs=60", "model.args.widths=[64, 128, 256, 512]", *many)
    yield "60 epochs, 64-128-256-512, both losses", "block", "after", both, wide, (0,)
    yield "60 epochs, 64-128-256-512, full precision", "block", "after", "", wide[:-1], (0,)
    low = f"{kernel('1e-5', '1e-3')}, {{type: feature_loss, theta: 1e-3, start: 8}}"
    for rate, w, sigma in (("1e-2", "1e-4", "1e-3"), ("2e-2", "2e-4", "2e-3")):
        wide = ("training.amp=bfloat16", "model.args.widths=[64, 128, 256, 512]", lr(rate))
        name = f"64-128-256-512 in bfloat16, learning rate {rate}"
        yield f"{name}, lambda 1e-5, theta 1e-3", "block", "after", low, (*wide, rates(w, sigma)), one
        yield f"{name}, full precision", "block", "after", "", wide, one
    wrn = "model={name: bonn_wrn22_16, num_classes: 10, args: {shortcut: block}}"
    yield "WRN22-16, full precision", "block", "before", "", (wrn,), one
    yield "WRN22-16, XNOR-Net", "block", "before", method("xnor"), (wrn,), one
    few = (wrn, rates("5e-5", "5e-4"))
    yield "WRN22-16, lambda 1e-4, nu 1e-3", "block", "before", kernel("1e-4", "1e-3"), few, one
    many = (wrn, *many)
    yield "WRN22-16, lambda 1e-4, nu 1e-3, learning rate 2e-2", "block", "before", kernel("1e-4", "1e-3"), many, one


def run(shortcut, norm, modifiers, overrides, seed):
    text = RECIPE.replace("SHORTCUT", shortcut).replace("NORM", norm)
    recipe = parse_recipe(text, overrides=[f"modifiers=[{modifiers}]", *overrides, f"training.seed={seed}"])
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(recipe, Path(folder), torch.device("cpu"), Quiet())
        runner.train(resume=False)
        return runner.task.measure(runner.model, torch.device("cpu"))["test_top1"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    done = {(r["name"], r["shortcut"], r["norm"], r["seed"]): r["top1"] for r in map(json.loads, lines)}
    for name, shortcut, norm, modifiers, overrides, seeds in tried():
        for seed in seeds:
            if not args.table and (name, shortcut, norm, seed) not in done:
                top1 = run(shortcut, norm, modifiers, overrides, seed)
                done[name, shortcut, norm, seed] = top1
                with args.out.open("a") as file:
                    record = {"name": name, "shortcut": shortcut, "norm": norm, "seed": seed, "top1": top1}
                    file.write(json.dumps(record) + "\n")
                print(f"{name}, {shortcut}, {norm}, seed {seed}: {top1:.1f}", flush=True)
        found = [done[name, shortcut, norm, s] for s in seeds if (name, shortcut, norm, s) in done]
        if args.table and found:
            print(f"| {name} | {shortcut} | {norm} | {', '.join(f'{t:.1f}' for t in found)} | {mean(found):.1f} |")


if __name__ == "__main__":
    main()
