"""``bonn bench``: the 1-bit export against the same network in full precision and in int8, in one process."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from bonn_plugin.checkpoint import WEIGHTS, load_packed, model_config_of
from bonn_plugin.export.builder import FOLDED
from bonn_plugin.export.engine import compile_for_cpu, cpu_name, import_openvino
from bonn_plugin.export.int8 import convolutions_in_int8, quantize
from bonn_plugin.export.lowering import build_graph
from bonn_plugin.export.memory import openvino_memory, torch_memory
from bonn_plugin.export.openvino import prefer_direct_stem, write_ir
from bonn_plugin.export.part import exported_part
from bonn_plugin.export.samples import samples_for
from bonn_plugin.export.timing import time_interleaved
from bonn_plugin.nn import PackedConv2d
from bonn_plugin.recipe import NetworkConfig, build_network

EAGER, COMPILED, FLOAT, INT8, BITS = (
    "torch eager fp32",
    "torch.compile fp32",
    "OpenVINO fp32",
    "OpenVINO int8",
    "OpenVINO 1-bit",
)
PROFILED_CALLS = 100
CALIBRATION_IMAGES = 64
Run = Callable[[], object]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Speed(_Part):
    """One engine at one number of threads: milliseconds at batch 1, images a second at ``batch``."""

    engine: str
    threads: int
    latency_ms: float
    latency_p95_ms: float
    calls: int
    batch: int
    images_per_second: float


class LayerTime(_Part):
    """Milliseconds of one binarised convolution, its sign included, and of the same convolution in float32."""

    name: str
    shape: tuple[int, ...]
    bits_ms: float
    float_ms: float
    runs_as: str


class Memory(_Part):
    """Bytes of a process with one engine and nothing else: at its peak, and of that after its imports."""

    engine: str
    imports: int
    peak: int


class Bench(_Part):
    """Everything that ``bonn bench`` shows."""

    network: str
    input_shape: tuple[int, ...]
    cpu: str
    versions: dict[str, str]
    speeds: tuple[Speed, ...]
    layers: tuple[LayerTime, ...]
    files: dict[str, int]
    memory: tuple[Memory, ...]
    notes: tuple[str, ...]

    def speed(self, engine: str, threads: int) -> Speed | None:
        """Return one engine's figures, None if it was not measured."""
        return next((s for s in self.speeds if (s.engine, s.threads) == (engine, threads)), None)


def run_bench(
    folder: Path,
    image: tuple[int, int, int],
    *,
    batch: int = 8,
    seconds: float = 2.0,
    torch_compile: bool = True,
    memory: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> Bench:
    """Measure a checkpoint, or the backbone and pyramid of a detector's.

    The rivals are the network of the checkpoint's name in float32, with random weights (speed does not
    depend on them), in torch and in OpenVINO, and that one quantised by NNCF.

    Args:
        folder: the checkpoint.
        image: (C, H, W); of a detector's images as they are scaled and padded.
        batch: images a call for the throughput; the latency is that of one image.
        seconds: measuring time of each engine, number of threads and batch.
        torch_compile: measure ``torch.compile`` too.
        memory: measure the peak memory, in a process for each engine.
        tell: is told what is going on.

    Raises:
        BonnError: the checkpoint is damaged or can't be exported, or OpenVINO or NNCF are missing.
    """
    ov = import_openvino()
    config = model_config_of(folder)
    part, packed = exported_part(load_packed(folder))
    torch.manual_seed(0)
    _, dense = exported_part(build_network(config).eval())
    calibration = samples_for(folder, image, CALIBRATION_IMAGES)
    notes = [f"int8: NNCF post-training quantization with its defaults, calibrated on {calibration.source}"]
    if part:
        notes.append(f"measured is the {part} with its pyramid: the detector's transform and heads run in torch")
    graphs: dict[int, dict[str, Any]] = {}
    for n in sorted({1, batch}):
        tell(f"building the graphs for batch {n}")
        graphs[n] = _graphs(packed, dense, (n, *image), calibration)
    eight, total = convolutions_in_int8(compile_for_cpu(graphs[1][INT8], 1))
    notes.append(f"int8: {eight} of {total} convolutions run in 8 bits")
    speeds: list[Speed] = []
    for threads in sorted({1, _cpus()}):
        speeds += _measure(dense, graphs, image, threads, seconds, torch_compile, notes, tell)
    shape = (1, *image)
    tell("profiling the layers")
    layers = _layer_times(packed, graphs[1])
    files, peaks = _sizes(folder, dense, graphs[1], config, shape, memory)
    return Bench(
        network=config.name,
        input_shape=shape,
        cpu=cpu_name(),
        versions={"torch": torch.__version__, "openvino": str(ov.get_version())},
        speeds=tuple(speeds),
        layers=layers,
        files=files,
        memory=peaks,
        notes=tuple(dict.fromkeys(notes)),
    )


def _graphs(packed: nn.Module, dense: nn.Module, shape: tuple[int, int, int, int], calibration: Any) -> dict[str, Any]:
    exact = build_graph(packed, shape)[0]
    return {
        FLOAT: build_graph(dense, shape)[0],
        INT8: quantize(build_graph(dense, shape)[0], calibration, shape),
        BITS: prefer_direct_stem(exact),
    }


def _measure(
    dense: nn.Module,
    graphs: Mapping[int, Mapping[str, Any]],
    image: tuple[int, int, int],
    threads: int,
    seconds: float,
    torch_compile: bool,
    notes: list[str],
    tell: Callable[[str], None],
) -> list[Speed]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    timings = {}
    try:
        for n, by_engine in graphs.items():
            tell(f"measuring batch {n} with {threads} threads")
            x = torch.randn(n, *image)
            runs: dict[str, Run] = {EAGER: _torch_run(dense, x)}
            if torch_compile:
                compiled = _compiled_run(dense, x, notes)
                if compiled is not None:
                    runs[COMPILED] = compiled
            runs.update({name: _engine_run(graph, x, threads) for name, graph in by_engine.items()})
            timings[n] = time_interleaved(runs, seconds)
    finally:
        torch.set_num_threads(before)
    batch = max(graphs)
    return [
        Speed(
            engine=name,
            threads=threads,
            latency_ms=1e3 * one.median,
            latency_p95_ms=1e3 * one.p95,
            calls=one.calls,
            batch=batch,
            images_per_second=batch / timings[batch][name].median,
        )
        for name, one in timings[1].items()
        if name in timings[batch]
    ]


def _torch_run(model: Callable[[Tensor], Any], x: Tensor) -> Run:
    def run() -> None:
        with torch.inference_mode():
            model(x)

    return run


def _compiled_run(model: nn.Module, x: Tensor, notes: list[str]) -> Run | None:
    torch._dynamo.reset()  # the threads are compiled in
    run = _torch_run(torch.compile(model, dynamic=False), x)
    try:
        run()
    except Exception as error:  # no C++ compiler, most often
        notes.append(f"torch.compile does not work here: {' '.join(str(error).split())[:160]}")
        return None
    return run


def _engine_run(graph: Any, x: Tensor, threads: int) -> Run:
    request = compile_for_cpu(graph, threads).create_infer_request()
    request.set_input_tensor(import_openvino().Tensor(x.numpy()))

    def run() -> None:
        request.infer()

    return run


def _layer_times(packed: nn.Module, graphs: Mapping[str, Any]) -> tuple[LayerTime, ...]:
    layers = {name: m for name, m in packed.named_modules() if isinstance(m, PackedConv2d)}
    by_bits, kinds = _profile(graphs[BITS], set(layers))
    by_float, _ = _profile(graphs[FLOAT], set(layers))
    return tuple(
        LayerTime(
            name=name,
            shape=m.geometry.weight_shape,
            bits_ms=by_bits[name],
            float_ms=by_float.get(name, 0.0),
            runs_as=kinds[name],
        )
        for name, m in layers.items()
        if name in by_bits
    )


def _profile(graph: Any, names: set[str]) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds by module name, and the kernel that ran its convolution; what was fused in counts in."""
    compiled = compile_for_cpu(graph, 1, profile=True)
    owner: dict[str, str] = {}
    for op in compiled.get_runtime_model().get_ops():
        info = op.get_rt_info()
        fused = info["originalLayersNames"].astype(str).split(",") if "originalLayersNames" in info else []
        kind = info["layerType"].astype(str)
        # a sign is fused with the norm before it, a convolution with what follows it: its own name decides
        suffix = ".sign" if kind == "FakeQuantize" else FOLDED
        own = [n.removesuffix(suffix) for n in fused if n.removesuffix(suffix) in names]
        if own and kind in ("FakeQuantize", "Convolution", "BinaryConvolution"):
            owner[op.get_friendly_name()] = own[0]
    request = compiled.create_infer_request()
    shape = compiled.input(0).shape
    x = torch.randn(*shape).numpy()
    request.infer({0: x})
    calls: dict[str, list[float]] = {}
    kinds: dict[str, str] = {}
    for _ in range(PROFILED_CALLS):
        request.infer({0: x})
        for node in request.get_profiling_info():
            if node.node_name in owner:
                calls.setdefault(node.node_name, []).append(node.real_time.total_seconds() * 1e3)
                if node.node_type != "FakeQuantize":
                    kinds[owner[node.node_name]] = node.exec_type
    times: dict[str, float] = {}
    for node_name, values in calls.items():
        kept = sorted(values)[: len(values) // 2]  # the engine rounds to microseconds: a mean, of the calm half
        times[owner[node_name]] = times.get(owner[node_name], 0.0) + sum(kept) / len(kept)
    return times, kinds


def _sizes(
    folder: Path,
    dense: nn.Module,
    graphs: Mapping[str, Any],
    config: NetworkConfig,
    shape: tuple[int, ...],
    memory: bool,
) -> tuple[dict[str, int], tuple[Memory, ...]]:
    buffer = io.BytesIO()
    torch.save(dense.state_dict(), buffer)
    whole = "" if config.task == "classification" else "heads and all, "
    files = {
        "torch float32 state": buffer.tell(),
        f"packed checkpoint, {whole}{WEIGHTS}": (folder / WEIGHTS).stat().st_size,
    }
    peaks: list[Memory] = []

    def note(engine: str, found: tuple[int, int] | None) -> None:
        if found is not None:
            peaks.append(Memory(engine=engine, imports=found[0], peak=found[1]))

    if memory:
        note(EAGER, torch_memory(json.dumps([config.model_dump(mode="json"), shape])))
    with tempfile.TemporaryDirectory() as place:
        for i, (engine, graph) in enumerate(graphs.items()):
            xml = Path(place) / f"{i}.xml"
            write_ir(graph, xml)
            files[f"{engine}, .bin"] = xml.with_suffix(".bin").stat().st_size
            if memory:
                note(engine, openvino_memory(xml))
    return files, tuple(peaks)


def _cpus() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return usable or 1


__all__ = ["BITS", "COMPILED", "EAGER", "FLOAT", "INT8", "Bench", "LayerTime", "Memory", "Speed", "run_bench"]
