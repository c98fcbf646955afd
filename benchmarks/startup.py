"""How long it takes to get going: imports beyond torch and timm, and ``bonn check`` as a whole process.

python benchmarks/startup.py
"""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from statistics import median

EVERYTHING = (
    "import bonn_plugin; "
    "[getattr(bonn_plugin, n) for n in bonn_plugin.__all__]; import bonn_plugin.models, bonn_plugin.functional"
)


def seconds(*command, runs=5):
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    return median(times[1:])


def main():
    host = seconds(sys.executable, "-c", "import torch, timm")
    name = seconds(sys.executable, "-c", "import torch, timm, bonn_plugin")
    everything = seconds(sys.executable, "-c", f"import torch, timm; {EVERYTHING}")
    check = seconds(sys.executable, "-m", "bonn_plugin", "check", "digits_wrn22_16")
    large = seconds(sys.executable, "-m", "bonn_plugin", "check", "imagenet_resnet18")
    print(f"{platform.machine()}, {datetime.now(UTC):%Y-%m-%d}, medians of 4 runs after one")
    print(f"import torch, timm: {host:.2f} s")
    print(f"import bonn_plugin beyond that: {name - host:.2f} s; all its public names: {everything - host:.2f} s")
    print(f"bonn check digits_wrn22_16: {check:.2f} s; imagenet_resnet18: {large:.2f} s")


if __name__ == "__main__":
    main()
