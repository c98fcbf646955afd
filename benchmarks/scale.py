"""What a run on ImageNet costs on 1, 4, 8 and 64 GPUs: the figures of docs/scale.md.

Measured here: what an image costs to read, crop and normalise on one processor core; what a step of the network keeps
for the backward pass; the bytes of gradients, statistics and state; the cost of the losses (benchmarks/step_cost.py).
Published: images per second of ResNet18 on one GPU. Assumed: the rest; each assumption is an argument and is printed.
From these a simulation of the data path gives the time of a step: loader processes that fill a queue at rates that
vary from image to image, a GPU that empties it, an all-reduce that overlaps with the backward pass.

    python benchmarks/scale.py
"""

from __future__ import annotations

import argparse
import io
import platform
import random
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import nn

from bonn_plugin import Session, parse_recipe
from bonn_plugin.data import load_splits
from bonn_plugin.recipe import ImageFolderConfig, recipe_model

TRAIN, TEST, EPOCHS = 1_281_167, 50_000, 70
PICTURE = (500, 375)
RECIPE = """
version: 1
name: scale
model: {name: bonn_resnet18, num_classes: 1000}
data: {name: imagefolder, root: /data/imagenet}
training: {epochs: 2, batch_size: 2, optimizer: {name: momentum, lr: 0.1}}
modifiers:
  - {type: binarize}
  - {type: kernel_loss, lambda: 1e-4, nu: 1e-3}
  - {type: feature_loss, theta: 1e-3}
"""


def picture():
    """Return a JPEG as large as ImageNet's are on average: 500 x 375, about 110 kB."""
    noise = np.random.default_rng(0).integers(0, 256, (PICTURE[1], PICTURE[0], 3), np.uint8)
    image = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1.0))
    for quality in range(95, 20, -1):
        file = io.BytesIO()
        image.save(file, "jpeg", quality=quality)
        if file.tell() <= 110_000:
            break
    return file.getvalue()


def time_of_an_image(rounds):
    """Return seconds of one core for reading, cropping and normalising one image, and the bytes of its file."""
    content = picture()
    with tempfile.TemporaryDirectory() as name:
        for part in ("train", "val"):
            (Path(name) / part / "a").mkdir(parents=True)
            for i in range(8):
                (Path(name) / part / "a" / f"{i}.jpg").write_bytes(content)
        data = load_splits(ImageFolderConfig(root=name), 1).train
        times = []
        for i in range(rounds):
            began = time.process_time()
            data[i % 8]
            times.append(time.process_time() - began)
    return median(times), len(content)


def kept_bytes(binary):
    """Return bytes that one 224-pixel image keeps for the backward pass, weights not counted."""
    recipe = parse_recipe(RECIPE if binary else RECIPE.split("modifiers:")[0])
    session = Session(recipe, 1)
    model = session.prepare(recipe_model(recipe)).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive: an address must not come again
        return tensor

    sizes = []
    for batch in (2, 4):
        found.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model(torch.randn(batch, 3, 224, 224))
            if binary:
                session.loss(labels=torch.zeros(batch, dtype=torch.long))
        sizes.append(sum(size for size, _ in found.values()))
        del logits
    weights = sum(p.numel() for p in model.parameters())
    norms = [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    return (sizes[1] - sizes[0]) / 2, weights, norms


def simulate(batch, workers, per_image, spread, compute, wait, steps, seed=0):
    """Return the mean time of a step, and the share of it that the GPU waits for images.

    Args:
        batch: images a GPU and step.
        workers: loader processes a GPU; each works on a whole batch and holds two at most.
        per_image: mean seconds of an image on a core.
        spread: standard deviation over mean of that time.
        compute: seconds of forward and backward pass.
        wait: seconds of the exchange that nothing hides.
        steps: how many.
        seed: of the times.
    """
    rng = random.Random(seed)
    deviation = spread * per_image * batch**0.5
    free, now, waited, taken = [0.0] * workers, 0.0, 0.0, []
    for step in range(steps):
        w = step % workers  # torch's loader hands batches out in turn, two ahead a worker
        begin = max(free[w], taken[step - 2 * workers] if step >= 2 * workers else 0.0)
        free[w] = begin + max(0.2 * batch * per_image, rng.gauss(batch * per_image, deviation))
        waited += max(0.0, free[w] - now)
        now = max(now, free[w])
        taken.append(now)
        now += compute + wait
    return now / steps, waited / now


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=3482, help="published images/s of ResNet18, AMP, channels last")
    parser.add_argument("--slowdown", type=float, default=1.5, help="assumed: 1-bit step over the plain one on a GPU")
    parser.add_argument("--kernel-loss", type=float, default=0.02, help="assumed: its share of a step at 256 a GPU")
    parser.add_argument("--batch", type=int, default=256, help="images a GPU and step")
    parser.add_argument("--workers", type=int, default=8, help="loader processes a GPU")
    parser.add_argument("--inside", type=float, default=20e9, help="assumed bytes/s of an all-reduce in a machine")
    parser.add_argument("--between", type=float, default=12.5e9, help="assumed bytes/s between machines of 8 GPUs")
    parser.add_argument("--latency", type=float, default=30e-6, help="assumed seconds of a small exchange and hop")
    parser.add_argument("--floor", type=float, default=0.02, help="assumed: shortest step, of launching its kernels")
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, 1 thread, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}")
    per_image, file = time_of_an_image(args.rounds)
    plain, _, _ = kept_bytes(binary=False)
    kept, weights, norms = kept_bytes(binary=True)
    print(
        f"measured: an image of {file:,} bytes takes {1e3 * per_image:.1f} ms of a core, {1 / per_image:.0f} images/s"
    )
    print(
        f"measured: an image keeps {kept / 2**20:.1f} MiB for the backward pass in float32, {plain / 2**20:.1f} MiB in "
        f"the plain network; {weights:,} parameters, {len(norms)} norms of {sum(norms):,} channels"
    )
    settings = ", ".join(f"{name} {value:g}" for name, value in vars(args).items() if name != "rounds")
    print(f"published or assumed: {settings}")
    gradients = 4 * weights
    for title, batch_of in (
        (f"{args.batch} images a step over all GPUs, as the recipe says", lambda gpus: args.batch // gpus),
        (f"{args.batch} images a step on each GPU: another recipe", lambda gpus: args.batch),
    ):
        print(f"\n{title}\n")
        print("| GPUs | hours | images/s | step | waits for images | exchange not hidden | sent | memory | read |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for gpus in (1, 4, 8, 64):
            print(row(args, gpus, batch_of(gpus), per_image, file, kept, gradients, len(norms)))


def row(args, gpus, batch, per_image, file, kept, gradients, norms):
    """Return one line of the table; ``batch`` is that of a GPU."""
    compute = max(args.floor, batch / args.rate * args.slowdown / (1 - args.kernel_loss))
    speed = args.inside if gpus <= 8 else args.between / 8  # eight GPUs share the machine's line
    sent = 2 * (gpus - 1) / gpus * gradients
    exchange = sent / speed + 2 * (gpus - 1) * args.latency if gpus > 1 else 0.0
    # a norm's statistics wait for the others: twice forward, once backward, each a tree of hops
    synced = 3 * norms * args.latency * (gpus.bit_length() - 1) if gpus > 1 else 0.0
    hidden = max(0.0, exchange - 0.9 * 2 / 3 * compute) + synced
    step, share = simulate(batch, args.workers, per_image, 0.5, compute, hidden, 2000)
    rate = gpus * batch / step
    hours = EPOCHS * (TRAIN // (gpus * batch) * step + TEST / (3 * rate)) / 3600
    # float32 weights, gradients, momentum; half copies under AMP; activations as measured
    memory = 14 * gradients / 4 + batch * kept
    return (
        f"| {gpus} | {hours:.1f} | {rate:,.0f} | {1e3 * step:.0f} ms | {100 * share:.0f} % | {1e3 * hidden:.1f} ms | "
        f"{sent / 1e6:.0f} MB | {memory / 2**30:.1f} GiB | {rate * file / 1e9:.2f} GB/s |"
    )


if __name__ == "__main__":
    main()
