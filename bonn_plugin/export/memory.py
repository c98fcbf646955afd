"""Peak memory of one engine, in a process of its own: in a shared one the peaks can't be told apart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_READ = """
def kib(key):
    with open("/proc/self/status") as file:
        return next((int(line.split()[1]) for line in file if line.startswith(key)), 0)
"""

_OPENVINO = """
import numpy as np, openvino as ov, sys
core = ov.Core(); core.get_property("CPU", "FULL_DEVICE_NAME")
before = kib("VmRSS")
settings = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": 1}
request = core.compile_model(sys.argv[1], "CPU", settings).create_infer_request()
for _ in range(3):
    request.infer({0: np.zeros(request.model_inputs[0].shape, np.float32)})
print(before, kib("VmHWM"))
"""

_TORCH = """
import json, sys, torch
from pydantic import TypeAdapter
from bonn_plugin.export.part import exported_part
from bonn_plugin.recipe import AnyModelConfig, build_network
torch.set_num_threads(1)
before = kib("VmRSS")
config, shape = json.loads(sys.argv[1])
_, model = exported_part(build_network(TypeAdapter(AnyModelConfig).validate_python(config)).eval())
with torch.inference_mode():
    for _ in range(3):
        model(torch.zeros(shape))
print(before, kib("VmHWM"))
"""


def openvino_memory(xml: Path) -> tuple[int, int] | None:
    """Return (bytes after the imports, peak bytes) of a process that runs an IR three times; None if unknown."""
    return _measure(_OPENVINO, str(xml))


def torch_memory(network: str) -> tuple[int, int] | None:
    """Return the same of a torch model; ``network`` is JSON, [configuration, shape]."""
    return _measure(_TORCH, network)


def _measure(program: str, argument: str) -> tuple[int, int] | None:
    if not Path("/proc/self/status").exists():
        return None
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _READ + program, argument], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return None
    before, peak = (1024 * int(n) for n in done.stdout.split()[-2:])
    return before, peak


__all__ = ["openvino_memory", "torch_memory"]
