"""OpenVINO itself: importing it, compiling for the CPU, and what this CPU can do."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

from bonn_plugin.errors import ExportError

INSTALL = "pip install 'bonn_plugin[openvino]'"
FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vpopcntdq": "VPOPCNTDQ",
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni": "AVX-VNNI",
    "amx_int8": "AMX-INT8",
}
"""Instruction sets that decide the speed, by their names in Linux's /proc/cpuinfo."""


def import_openvino() -> Any:
    """Return the module ``openvino``.

    Raises:
        ExportError: it is not installed.
    """
    try:
        import openvino
        import openvino.opset14
    except ImportError as error:
        raise ExportError(f"OpenVINO can't be imported ({error}): {INSTALL}") from None
    return openvino


@cache
def core() -> Any:
    """Return the one ``openvino.Core`` of this process, which lives as long as it.

    Each Core sets the thread's alternate signal stack, and takes back what it found when it goes. With two of
    them, the first gone first, the second leaves a stack that is freed already: the next signal that is handled,
    such as Ctrl-C, kills the process.
    """
    return import_openvino().Core()


def compile_for_cpu(model: Any, threads: int | None = None, *, profile: bool = False) -> Any:
    """Compile an ``openvino.Model`` for one stream on the CPU.

    Arithmetic stays float32: the engine would else compute in bfloat16 where the CPU has it, and round the
    activations of linear layers with integer weights to 8 bits.

    Args:
        model: the model.
        threads: how many; None for as many as the CPU has.
        profile: measure each layer.

    Raises:
        ExportError: this CPU's engine can't run it.
    """
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": 1,
        "PERF_COUNT": profile,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    try:
        return core().compile_model(model, "CPU", settings)
    except RuntimeError as error:
        raise ExportError(f"OpenVINO can't run this network on this CPU: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Return the last line of an engine's message: those before name its source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__


def cpu_name() -> str:
    """Return the CPU's name and the instruction sets on which speed depends, such as ``AMD EPYC (AVX2, AVX-512)``."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux: the engine's own word for what it found
        return str(core().get_property("CPU", "FULL_DEVICE_NAME"))
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    info = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(info.get("flags", "").split())
    known = [text for flag, text in FLAGS.items() if flag in flags]
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    if limit:
        known.append(f"limited by ONEDNN_MAX_CPU_ISA={limit}")
    return f"{info.get('model name', platform.processor() or 'unknown CPU')} ({', '.join(known) or 'no AVX2'})"


__all__ = ["INSTALL", "compile_for_cpu", "core", "cpu_name", "import_openvino", "reason"]
