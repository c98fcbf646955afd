"""What a training step costs: 1-bit over full precision, and with the kernel loss over without.

The three networks take their steps in turn in one process, so that a machine whose speed drifts slows all of them;
ratios are medians of ratios within a round. Peak memory is that of a fresh process for each, since the allocator of
one would hide that of the next; what the process holds before the network is made is subtracted. It is given twice:
for what is live, where every tensor goes back to the system when it is freed (glibc with a fixed mmap threshold), and
as glibc's allocator keeps freed memory by default.

    python benchmarks/step_cost.py --model bonn_wrn22_64 --batch 64 --size 32
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch

from bonn_plugin import Session, parse_recipe
from bonn_plugin.optim import make_optimizer
from bonn_plugin.recipe import recipe_model

RECIPE = """
version: 1
name: step_cost
model: {{name: {model}, num_classes: 10}}
data: {{name: digits, size: {size}}}
training: {{epochs: 1, batch_size: {batch}, optimizer: {{name: sgd, lr: 1e-3, weight_decay: 1e-4}}}}
modifiers: {modifiers}
"""
KINDS = {
    "full precision": "[]",
    "1-bit": "[{type: binarize}]",
    "1-bit, kernel loss": "[{type: binarize}, {type: kernel_loss, lambda: 1e-4, nu: 1e-4}]",
}


def stepper(kind, args):
    """Return a function that does one whole training step."""
    recipe = parse_recipe(RECIPE.format(model=args.model, size=args.size, batch=args.batch, modifiers=KINDS[kind]))
    torch.manual_seed(0)
    session = Session(recipe, 10**6)
    model = session.prepare(recipe_model(recipe)).to(args.device).train()
    optimizer = make_optimizer(recipe.training.optimizer, session.param_groups())
    images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    labels = torch.randint(10, (args.batch,), device=args.device)

    def step():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels) + session.loss(labels=labels).total
        loss.backward()
        optimizer.step()
        session.step()
        if args.device != "cpu":
            torch.cuda.synchronize()

    return step


def own_peak():
    # not ru_maxrss: that is inherited from the process that started this one
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def measure_memory(kind, args):
    """Return MiB that the steps of one network add to a process, measured inside a fresh one."""
    before = own_peak()
    step = stepper(kind, args)
    for _ in range(3):
        step()
    if args.device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return own_peak() - before


def memory_of(kind, environment):
    """Return ``measure_memory`` of a fresh process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", kind]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bonn_wrn22_64")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--times-only", action="store_true", help="measure no memory")
    parser.add_argument("--memory-of", choices=list(KINDS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(measure_memory(args.memory_of, args))
        return
    steps = {kind: stepper(kind, args) for kind in KINDS}
    times = {kind: [] for kind in KINDS}
    for turn in range(args.rounds + 2):
        for kind, step in steps.items():
            began = time.perf_counter()
            step()
            if turn >= 2:
                times[kind].append(time.perf_counter() - began)
    live = kept = {}
    if not args.times_only:
        live = {kind: memory_of(kind, {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}) for kind in KINDS}
        kept = {kind: memory_of(kind, dict(os.environ)) for kind in KINDS}

    def ratio(a, b):
        return median(x / y for x, y in zip(times[a], times[b], strict=True))

    full, plain, loss = KINDS
    print(
        f"{args.model}, batch {args.batch}, {args.size}x{args.size}, {args.device}, {platform.machine()}, "
        f"{args.threads} threads, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}"
    )
    for kind in KINDS:
        peak = (
            f", peak memory {live[kind]:.0f} MiB live, {kept[kind]:.0f} MiB as the allocator keeps it" if live else ""
        )
        print(f"{kind}: median step {median(times[kind]):.3f} s{peak}")
    print(f"step, kernel loss over none: {ratio(loss, plain):.3f}")
    print(f"step, 1-bit over full precision: {ratio(plain, full):.3f}")
    print(f"step, 1-bit with kernel loss over full precision: {ratio(loss, full):.3f}")
    if not live:
        return
    print(f"peak live memory, 1-bit with kernel loss over full precision: {live[loss] / live[full]:.3f}")
    print(f"the same with what the allocator keeps: {kept[loss] / kept[full]:.3f}")


if __name__ == "__main__":
    main()
