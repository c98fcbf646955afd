"""Kills at random moments: no corrupt checkpoint, and every resumed run ends with the weights of one that ran on.

Each run is killed by SIGKILL at random moments, up to four times, and resumed each time with a state in mid-epoch every
few steps. After each kill the state is read, and the packed checkpoint verified if there is one; in the end all tensors
of the training state are compared bit for bit with those of the run that nothing interrupted.

    python benchmarks/kills.py --kills 200
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
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

from bonn_plugin import verify_packed  # noqa: E402
from bonn_plugin.checkpoint import load_state  # noqa: E402
from bonn_plugin.cli import main as command  # noqa: E402

RECIPE = """
version: 1
name: killed
model: {name: bonn_wrn22_16, num_classes: 10, args: {depth: 10, widths: [8, 8, 8], drop_rate: 0.1}}
data: {name: digits, size: 8, pad: 1}
training: {epochs: 3, batch_size: 128, ema: 0.9, optimizer: {name: adam, lr: 1e-2}}
modifiers:
  - {type: binarize}
  - {type: kernel_loss, lambda: 1e-3, nu: 1e-3}
  - {type: feature_loss, theta: 1e-2}
  - {type: filter_merge, keep: 0.5, start: 1, end: 3}
"""


def child(place, run, resume):
    os.chdir(place)
    os.dup2(os.open("child.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    sys.argv = ["bonn", "compress", "recipe.yaml", "--out", run, "--device", "cpu", "--checkpoint-every", "4"]
    sys.argv += ["--resume"] if resume else []
    command()


def start(place, run, resume):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bonn_plugin.train", "bonn_plugin.cli", "sklearn.datasets"])
    process = context.Process(target=child, args=(place, run, resume))
    process.start()
    return process


def tensors(state):
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from tensors(value)


def same(one, other):
    pairs = [zip(tensors(one[p]), tensors(other[p]), strict=True) for p in ("session", "model", "optimizer", "ema")]
    return all(torch.equal(a, b) for part in pairs for a, b in part)


def check(folder):
    """Read whatever a killed run left; raises where it is corrupt. Return how far it was."""
    state = folder / "training" / "state.pt"
    if (folder / "config.json").exists():
        verify_packed(folder)
    if not state.exists():
        return "before the first state"
    loaded = load_state(state)
    if (folder / "config.json").exists():
        return "packing or packed"
    return "in mid-epoch" if loaded["session"]["step"] else "at the end of an epoch"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    found = Counter()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "recipe.yaml").write_text(RECIPE)
        for _ in range(2):  # the first one starts the server
            began = time.monotonic()
            process = start(place, f"whole{began}", resume=False)
            process.join()
            assert process.exitcode == 0, (place / "child.out").read_text()[-2000:]
        length = time.monotonic() - began
        whole = load_state(place / f"whole{began}" / "training" / "state.pt")
        kills = runs = 0
        while kills < args.kills:
            run = f"run{runs}"
            folder = place / run
            for _ in range(rng.randint(1, 4)):
                process = start(place, run, resume=(folder / "training" / "state.pt").exists())
                process.join(rng.uniform(0.1, 1.0) * length)
                if process.exitcode is not None:
                    assert process.exitcode == 0, (place / "child.out").read_text()[-2000:]
                    break
                process.kill()
                process.join()
                kills += 1
                found["state saved " + check(folder)] += 1
            if not (folder / "report.json").exists():
                process = start(place, run, resume=(folder / "training" / "state.pt").exists())
                process.join()
                assert process.exitcode == 0, (place / "child.out").read_text()[-2000:]
            runs += 1
            verified = verify_packed(folder).identical
            equal = same(load_state(folder / "training" / "state.pt"), whole)
            found["runs that ended with the same weights" if equal and verified else "RUNS THAT DIFFER"] += 1
    print(f"{platform.machine()}, 1 thread, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}, seed {args.seed}")
    print(f"{kills} kills in {runs} runs, none left a corrupt file; {dict(sorted(found.items()))}")


if __name__ == "__main__":
    main()
