"""The speed behind README's figures: ResNet18 with 1-bit convolutions in OpenVINO against float32 and int8.

    python benchmarks/inference.py [--json FILE] [--seconds 3] [--no-torch-compile]

Weights are random: the time does not depend on them. All engines take turns in one process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from bonn_plugin import ModelConfig, Session, load_recipe, save_packed
from bonn_plugin.export.bench import BITS, EAGER, FLOAT, INT8, Bench, run_bench
from bonn_plugin.export.bench_report import to_terminal
from bonn_plugin.export.engine import compile_for_cpu, cpu_name, import_openvino
from bonn_plugin.export.lowering import build_graph
from bonn_plugin.export.openvino import export_openvino
from bonn_plugin.export.samples import noise
from bonn_plugin.export.timing import time_interleaved
from bonn_plugin.models import build_model
from bonn_plugin.nn import BinaryConv2d, replace_module

LAYERS = {(64, 56): 12, (128, 28): 16, (256, 14): 18, (512, 7): 24}
"""Required speed-up over torch's best by (channels, size)."""
WHOLE = {(224, EAGER): 13.0, (224, FLOAT): 8.0, (224, INT8): 1.7, (32, EAGER): 25.0}
"""Required speed-up of ResNet18 by (size, rival), 1 thread, batch 1."""
WITH_INT8 = {(224, EAGER): 18.0}
"""The same where the real-valued rest is in int8."""
OWN_NODES = ("0", "0.sign")
"""The one layer's nodes in its graph."""
FILES = {False: 4_300_000, True: 2_900_000}
"""Largest model.bin of ResNet18 in bytes by whether the real rest is float16."""


def main() -> None:
    """Measure, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--seconds", type=float, default=3.0, help="measuring time of each candidate")
    parser.add_argument("--no-torch-compile", action="store_true")
    args = parser.parse_args()
    console = Console(soft_wrap=True, highlight=False)
    found: dict[str, Any] = {"cpu": cpu_name(), "torch": torch.__version__}
    found["layers"] = [measure_layer(c, size, need, args.seconds) for (c, size), need in LAYERS.items()]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = binarised_resnet18()
        save_packed(model, folder, ModelConfig(name="bonn_resnet18", num_classes=1000))
        found["files"] = [measure_file(model, folder, half, limit) for half, limit in FILES.items()]
        found["whole"] = []
        for size in (224, 32):
            bench = run_bench(
                folder,
                (3, size, size),
                seconds=args.seconds,
                torch_compile=not args.no_torch_compile,
                memory=size == 224,
            )
            console.print(to_terminal(bench))
            found["whole"] += whole_rows(bench, size)
            found[f"bench_{size}"] = json.loads(bench.model_dump_json())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_packed(with_int8_rest(), folder, ModelConfig(name="bonn_resnet18", num_classes=1000))
        bench = run_bench(folder, (3, 224, 224), seconds=args.seconds, torch_compile=False, memory=False)
        console.print(to_terminal(bench))
        found["whole"] += whole_rows(bench, 224, WITH_INT8, "ResNet18 with an int8 rest")
        found["bench_224_int8_rest"] = json.loads(bench.model_dump_json())
    console.print(f"\n{found['cpu']}, torch {torch.__version__}, 1 thread, batch 1")
    for row in [*found["layers"], *found["whole"], *found["files"]]:
        console.print(("holds  " if row["holds"] else "MISSES ") + row["text"])
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def binarised_resnet18() -> nn.Module:
    """bonn_resnet18 with its 16 3x3 convolutions packed, random weights."""
    torch.manual_seed(0)
    model = build_model("bonn_resnet18", 1000, {}).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d) and name.endswith(".conv"):
            replace_module(model, name, BinaryConv2d(module).pack())
    return model.eval()


def with_int8_rest() -> nn.Module:
    """The same network with stem, 1x1 convolutions and classifier in int8, calibrated on noise; random weights."""
    recipe = load_recipe(Path(__file__).parent.parent / "recipes" / "imagenet_resnet18_int8.yaml")
    torch.manual_seed(0)
    session = Session(recipe, 1)
    session.prepare(build_model("bonn_resnet18", 1000, {})).eval()
    return session.convert(lambda: [torch.randn(2, 3, 224, 224)])


def measure_layer(channels: int, size: int, required: float, seconds: float) -> dict[str, Any]:
    """One 3x3 convolution at batch 1: the binary one, its sign included, against torch's best in float32."""
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    packed = nn.Sequential(BinaryConv2d(conv).eval().pack())
    x = torch.randn(1, channels, size, size)
    request = compile_for_cpu(build_graph(packed, (1, *x.shape[1:]))[0], 1, profile=True).create_infer_request()
    request.set_input_tensor(import_openvino().Tensor(x.numpy()))
    torch.set_num_threads(1)
    rivals = torch_convolutions(conv, x)
    # The engine's own clock leaves out the layout changes at the ends, which a network has once.
    times: list[float] = []

    def run_bits() -> None:
        request.infer()
        times.append(sum(n.real_time.total_seconds() for n in request.get_profiling_info() if n.node_name in OWN_NODES))

    timed = time_interleaved({"bits": run_bits, **rivals}, seconds)
    best = min(rivals, key=lambda name: timed[name].median)
    ours, theirs, whole = float(np.median(times)), timed[best].median, timed["bits"].median
    ratio = theirs / ours
    return {
        "channels": channels,
        "size": size,
        "bits_ms": 1e3 * ours,
        "bits_call_ms": 1e3 * whole,
        "float_ms": {name: 1e3 * timed[name].median for name in rivals},
        "ratio": ratio,
        "required": required,
        "holds": ratio >= required,
        "text": f"3x3 {channels}@{size}: {ratio:.1f}x torch's best fp32 ({best}, {1e3 * theirs:.3f} ms against "
        f"{1e3 * ours:.3f} ms; {theirs / whole:.1f}x with the layout changes at the ends of this one-layer graph), "
        f"required {required}",
    }


@torch.inference_mode()
def torch_convolutions(conv: nn.Conv2d, x: Tensor) -> dict[str, Callable[[], object]]:
    """Ways to run a float32 convolution in torch: plain, channels last, and with weights packed by oneDNN."""
    last = torch.channels_last
    weight = conv.weight.detach()
    x_last, weight_last = x.contiguous(memory_format=last), weight.contiguous(memory_format=last)
    x_mkldnn = x.to_mkldnn()
    weight_mkldnn = torch._C._nn.mkldnn_reorder_conv2d_weight(
        weight.to_mkldnn(), [1, 1], [1, 1], [1, 1], 1, list(x.shape)
    )

    def inference(run: Callable[[], object]) -> Callable[[], object]:
        return torch.inference_mode()(run)

    return {
        "contiguous": inference(lambda: nn.functional.conv2d(x, weight, None, 1, 1)),
        "channels_last": inference(lambda: nn.functional.conv2d(x_last, weight_last, None, 1, 1)),
        "mkldnn": inference(lambda: torch.mkldnn_convolution(x_mkldnn, weight_mkldnn, None, (1, 1), (1, 1), (1, 1), 1)),
    }


def measure_file(model: nn.Module, folder: Path, half: bool, limit: int) -> dict[str, Any]:
    """Size of model.bin for ResNet18 with 1000 classes."""
    export_openvino(model, folder, (1, 3, 64, 64), noise((3, 64, 64), "benchmark"), half=half)
    size = (folder / "openvino" / "model.bin").stat().st_size
    text = f"model.bin of ResNet18{', float16 rest' if half else ''}: {size:,} bytes, at most {limit:,}"
    return {"half": half, "bytes": size, "limit": limit, "holds": size <= limit, "text": text}


def whole_rows(
    bench: Bench, size: int, asked: Mapping[tuple[int, str], float] = WHOLE, network: str = "ResNet18"
) -> list[dict[str, Any]]:
    """The ratios that are asked for."""
    own = bench.speed(BITS, 1)
    rows = []
    for (at, rival), required in asked.items():
        other = bench.speed(rival, 1)
        if at != size or own is None or other is None:
            continue
        ratio = other.latency_ms / own.latency_ms
        text = (
            f"{network} at {size} px: {ratio:.2f}x {rival} ({other.latency_ms:.2f} ms against "
            f"{own.latency_ms:.2f} ms), required {required}"
        )
        rows.append(
            {
                "network": network,
                "size": size,
                "rival": rival,
                "ratio": ratio,
                "required": required,
                "holds": ratio >= required,
                "text": text,
            }
        )
    return rows


if __name__ == "__main__":
    main()
