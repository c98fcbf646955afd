"""The time of grouping ResNet18's filters, and of a training step inside and outside filter_merge's window.

    python benchmarks/merging_times.py

Blocks of steps inside and outside are taken in turns, and the first step of each block is left out. glibc's allocator
is told to keep what is freed: by default it gives memory back and takes it anew, some 80,000 page faults a step of
either kind, and which kind pays for them is chance. The figures are medians of processor time on one thread, which
other work on the machine disturbs less than the time on the clock.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime

import torch

from bonn_plugin import Session, parse_recipe
from bonn_plugin.functional import group_filters
from bonn_plugin.nn import BinaryConv2d
from bonn_plugin.recipe import recipe_model

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""mallopt's parameters, malloc.h of glibc."""
STEPS = 4
"""Steps of a block."""

RECIPE = """
version: 1
name: times
model: {{task: classification, name: {net}, num_classes: 10}}
data: {{name: digits, size: {size}}}
training: {{epochs: 2, batch_size: {batch}, optimizer: {{name: adam, lr: 1e-3}}}}
modifiers:
  - {{type: binarize}}
  - {{type: kernel_loss, lambda: 1e-4, nu: 1e-3}}
  - {{type: filter_merge, keep: 0.5, start: {start}}}
"""


def stepper(net: str, size: int, batch: int, start: int) -> Callable[[], float]:
    """Return a function that takes a training step and returns its processor time in seconds."""
    recipe = parse_recipe(RECIPE.format(net=net, size=size, batch=batch, start=start))
    torch.manual_seed(0)
    session = Session(recipe, 1000)
    model = session.prepare(recipe_model(recipe))
    optimizer = torch.optim.Adam(session.param_groups())
    images, labels = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))

    def step() -> float:
        began = time.process_time()
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels) + session.loss(labels).total
        loss.backward()
        optimizer.step()
        session.step()
        return time.process_time() - began

    return step


def block(step: Callable[[], float]) -> list[float]:
    """Return the times of a few steps in a row, without that of the first."""
    step()
    return [step() for _ in range(STEPS)]


def keep_freed_memory() -> None:
    """Tell glibc not to give memory back; elsewhere nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    print(f"{platform.machine()}, 1 thread, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}")
    recipe = parse_recipe(RECIPE.format(net="bonn_resnet18", size=224, batch=1, start=0))
    model = Session(recipe, 1).prepare(recipe_model(recipe))
    layers = [m for m in model.modules() if isinstance(m, BinaryConv2d)]
    for keep in (0.75, 0.5, 0.25):
        began = time.perf_counter()
        for layer in layers:
            group_filters(layer.weight, keep, 0)
        print(f"grouping {len(layers)} layers of ResNet18 at keep {keep}: {time.perf_counter() - began:.1f} s")
    for net, size, batch in (("bonn_wrn22_16", 16, 64), ("bonn_resnet18", 64, 32), ("bonn_resnet18", 224, 16)):
        inside, outside = stepper(net, size, batch, 0), stepper(net, size, batch, 1)
        blocks = args.blocks if size < 224 else max(2, args.blocks // 2)
        pairs = [pair for _ in range(blocks) for pair in zip(block(inside), block(outside), strict=True)]
        a, b = (1000 * statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(i / o for i, o in pairs)
        print(f"{net}, {size} px, batch {batch}: {a:.0f} ms inside, {b:.0f} ms outside, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
