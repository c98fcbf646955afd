"""OpenVINO as the deployment engine: export a packed checkpoint, load the export, call it.

``DIR/openvino`` holds ``model.xml``, ``model.bin`` (one bit a binary weight) and ``export.json`` with the
input's shape, the outputs' names, the checksums and the self-test's outcome.

    classify = load("runs/digits_wrn22_16")
    logits = classify(images)        # numpy or torch, (any number, C, H, W)

Of a detector the backbone with its pyramid is exported; ``bonn_plugin.export.detection`` puts torch's heads on it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor, nn

from bonn_plugin.errors import CheckpointError, ExportError
from bonn_plugin.export.engine import compile_for_cpu, core, cpu_name, import_openvino, reason
from bonn_plugin.export.halve import with_half_weights
from bonn_plugin.export.integer import real_layers
from bonn_plugin.export.lowering import OUTPUT, build_graph
from bonn_plugin.export.part import exported_part, fingerprint
from bonn_plugin.export.selftest import SelfTest, self_test
from bonn_plugin.export.stem import split_stem
from bonn_plugin.files import sha256, write_files

FOLDER, XML, BIN, ABOUT = "openvino", "model.xml", "model.bin", "export.json"
FORMAT, VERSION = "bonn-openvino-export", 2
READABLE = (1, 2)
"""Version 1 had no ``part``, ``outputs`` and ``fingerprint``: it held whole networks that give logits."""
Images = TypeVar("Images", np.ndarray[Any, Any], Tensor)


@dataclass(frozen=True)
class ExportInfo:
    """What ``export.json`` says.

    Attributes:
        input_shape: (B, C, H, W), static.
        half: real weights are stored as float16.
        binary_layers: how each binary convolution runs, ``"bits"`` or ``"float32"``, by module name.
        real_layers: how each other convolution and linear layer is expressed: ``"int8"``, ``"float32"``, or the
            latter from weights that are stored narrower; by module name.
        openvino: the version that made it.
        cpu: where the self-test ran.
        self_test: what it found.
        sha256: checksums by file name.
        part: the submodule that was exported, such as a detector's ``backbone``; empty for the whole network.
        outputs: the outputs' names.
        fingerprint: of the exported part's stored tensors; empty in exports of version 1.
    """

    input_shape: tuple[int, int, int, int]
    half: bool
    binary_layers: Mapping[str, str]
    openvino: str
    cpu: str
    self_test: SelfTest
    sha256: Mapping[str, str]
    part: str = ""
    outputs: tuple[str, ...] = (OUTPUT,)
    fingerprint: str = ""
    real_layers: Mapping[str, str] = field(default_factory=dict)


class Exported:
    """An export in memory, ready to run on the CPU.

    Attributes:
        info: what was exported.
    """

    def __init__(self, model: Any, info: ExportInfo, threads: int | None) -> None:
        self.info = info
        self._request = compile_for_cpu(model, threads).create_infer_request()

    def __call__(self, images: Images) -> Images:
        """Return the logits of images.

        Args:
            images: (N, C, H, W), any N, floating point, prepared as in training; numpy or torch. They are
                run in batches of the exported size, the last one filled up with zeros.

        Returns:
            float32 (N, classes), of the kind that was given.

        Raises:
            ExportError: C, H or W is not what was exported, or a detector's backbone was.
        """
        if self.info.outputs != (OUTPUT,):
            raise ExportError(
                f"the export is a {self.info.part or 'network'} that gives {', '.join(self.info.outputs)}, no logits: "
                "call features(), or take bonn_plugin.export.detection.load_detector()"
            )
        return self.features(images)[OUTPUT]

    def features(self, images: Images) -> dict[str, Images]:
        """Return every output of images by name.

        Args:
            images: as above; for a detector's backbone scaled, normalised and padded as its transform does.

        Returns:
            float32, (N, ...) each, of the kind that was given.

        Raises:
            ExportError: C, H or W is not what was exported.
        """
        if isinstance(images, Tensor):
            found = self._run(images.detach().cpu().float().numpy())
            return {name: torch.from_numpy(value) for name, value in found.items()}
        return self._run(np.asarray(images, np.float32))

    def _run(self, images: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
        batch, *rest = self.info.input_shape
        if images.ndim != 4 or list(images.shape[1:]) != rest:
            raise ExportError(
                f"the export takes images of shape (N, {', '.join(map(str, rest))}), not {tuple(images.shape)}: "
                "export again with --size"
            )
        parts: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in self.info.outputs}
        for start in range(0, len(images), batch):
            part = np.ascontiguousarray(images[start : start + batch])
            full = np.concatenate([part, np.zeros((batch - len(part), *rest), np.float32)])
            self._request.infer({0: full})
            for name, found in parts.items():
                found.append(self._request.get_tensor(name).data[: len(part)].copy())
        if not len(images):
            return {n: np.empty((0, *self._request.get_tensor(n).shape[1:]), np.float32) for n in parts}
        return {name: np.concatenate(found) for name, found in parts.items()}


def export_openvino(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_shape: tuple[int, int, int, int],
    samples: Iterable[Tensor],
    *,
    source: str = "the given samples",
    half: bool = False,
) -> ExportInfo:
    """Export a packed model into ``path/openvino``, unless the engine's outputs are not the model's.

    Of a detector the backbone with its pyramid is exported; its transform and heads stay in torch.

    Args:
        model: what ``load_packed`` returned.
        path: the checkpoint's folder.
        input_shape: (B, C, H, W); of a detector that of the images as its transform leaves them.
        samples: batches of images, (any number, C, H, W), for the self-test.
        source: what they are, for the report.
        half: store the weights of real convolutions and linear layers as float16. The self-test then
            compares with the torch model that has the same rounded weights.

    Returns:
        What was written. Nothing is written on an error.

    Raises:
        ExportError: a module can't be expressed, the outputs differ, OpenVINO is missing, the disk is full.
    """
    ov = import_openvino()
    part, network = exported_part(model)
    reference = with_half_weights(network) if half else network
    graph, paths = build_graph(reference, input_shape, half=half)
    xml, weights = _serialize(graph)
    parsed = _parse(xml, weights, "the export")
    tested = self_test(reference, parsed, input_shape, samples, source)
    info = ExportInfo(
        input_shape=input_shape,
        half=half,
        binary_layers=_named(part, paths),
        openvino=str(ov.get_version()),
        cpu=cpu_name(),
        self_test=tested,
        sha256={XML: sha256(xml), BIN: sha256(weights)},
        part=part,
        outputs=tested.outputs,
        fingerprint=fingerprint(network),
        real_layers=_named(part, real_layers(reference)),
    )
    about = json.dumps(_to_json(info), indent=1) + "\n"
    try:
        write_files(Path(path) / FOLDER, {BIN: weights, XML: xml, ABOUT: about.encode()})
    except CheckpointError as error:
        raise ExportError(str(error)) from error
    return info


def load(path: str | os.PathLike[str], threads: int | None = None) -> Exported:
    """Load the export of a checkpoint folder; checksums are compared first.

    Args:
        path: the checkpoint's folder (or its ``openvino`` folder).
        threads: how many the engine may use; None for all.

    Raises:
        ExportError: there is no export, it is damaged, or OpenVINO is missing.
    """
    import_openvino()
    info, xml, weights = _read(Path(path))
    return Exported(_parse(xml, weights, str(_folder(Path(path)))), info, threads)


def has_export(path: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint folder holds an export, whole or not."""
    return (Path(path) / FOLDER).is_dir()


def read_info(path: str | os.PathLike[str]) -> ExportInfo:
    """Return what an export says of itself, its own checksum compared.

    Raises:
        ExportError: there is no export, or ``export.json`` is damaged.
    """
    return _read_about(_folder(Path(path)), Path(path))


def verify_export(
    model: nn.Module, path: str | os.PathLike[str], samples: Iterable[Tensor], source: str = "the given samples"
) -> SelfTest:
    """Check an export's files, and its outputs against those of the checkpoint's model.

    Args:
        model: what ``load_packed`` returned for the same folder.
        path: the checkpoint's folder.
        samples: as in ``export_openvino``.
        source: what they are.

    Raises:
        ExportError: the files are damaged, or the outputs are not the model's.
    """
    import_openvino()
    info, xml, weights = _read(Path(path))
    _, network = exported_part(model)
    reference = with_half_weights(network) if info.half else network
    parsed = _parse(xml, weights, str(_folder(Path(path))))
    try:
        return self_test(reference, parsed, info.input_shape, samples, source)
    except ExportError as error:
        raise ExportError(f"{_folder(Path(path))}: {error}; if the checkpoint is newer, export it again") from error


def write_ir(graph: Any, xml: Path) -> None:
    """Write an ``openvino.Model`` as ``xml`` and the .bin beside it."""
    import_openvino().serialize(graph, str(xml), str(xml.with_suffix(".bin")))


def prefer_direct_stem(graph: Any) -> Any:
    """Return a graph as an export holds it; see ``split_stem`` and ``_prefer_direct_stem``."""
    return _parse(*_serialize(graph), "the export")


def _serialize(graph: Any) -> tuple[bytes, bytes]:
    split_stem(graph)
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / XML
        write_ir(graph, xml)
        return _prefer_direct_stem(xml.read_bytes()), xml.with_suffix(".bin").read_bytes()


def _prefer_direct_stem(xml: bytes) -> bytes:
    """Ask for the direct convolution where the default one is slower: real layers of up to 4 channels, and int8.

    It is the engine's own hint; a CPU without AVX-512 goes by its defaults.
    """
    root = ElementTree.fromstring(xml)
    integers = {
        layer.get("id")
        for layer in root.iter("layer")
        if layer.get("type") == "FakeQuantize" and layer.find("data[@levels='256']") is not None
    }
    by_integers = {
        edge.get("to-layer")
        for edge in root.iter("edge")
        if edge.get("from-layer") in integers and edge.get("to-port") == "0"
    }
    for layer in root.iter("layer"):
        if layer.get("type") != "Convolution":
            continue
        channels = next(port.findall("dim")[1].text for port in layer.iterfind("input/port"))
        wanted = int(channels or 0) <= 4 or layer.get("id") in by_integers
        if wanted and layer.find("rt_info") is None:
            hint = ElementTree.Element("rt_info")
            ElementTree.SubElement(
                hint, "attribute", {"name": "primitives_priority", "version": "0", "value": "cpu:jit_avx512"}
            )
            layer.insert(1 if layer.find("data") is not None else 0, hint)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


def _parse(xml: bytes, weights: bytes, what: str) -> Any:
    try:
        return core().read_model(xml, weights)
    except RuntimeError as error:
        raise ExportError(f"{what}: OpenVINO can't read the network: {reason(error)}") from error


def _folder(path: Path) -> Path:
    return path if (path / ABOUT).exists() else path / FOLDER


def _read(path: Path) -> tuple[ExportInfo, bytes, bytes]:
    folder = _folder(path)
    info = _read_about(folder, path)
    contents = []
    for name in (XML, BIN):
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise ExportError(f"{folder / name}: can't be read: {error.strerror}") from None
        if sha256(content) != info.sha256.get(name):
            raise ExportError(
                f"{folder / name}: the checksum is wrong: the file is truncated, damaged or from another export"
            )
        contents.append(content)
    return info, contents[0], contents[1]


def _read_about(folder: Path, path: Path) -> ExportInfo:
    place = folder / ABOUT
    try:
        text = place.read_bytes()
    except OSError:
        raise ExportError(f"{place}: missing; make it by: bonn export {path} --to openvino") from None
    try:
        body = json.loads(text)
        if body["format"] != FORMAT or body["version"] not in READABLE:
            raise ExportError(f"{place}: not an export that this package reads: export it again")
        stated = body.pop("self")
        if stated != _digest(body):
            raise ExportError(f"{place}: the checksum is wrong: the file was changed or damaged")
        batch, channels, height, width = body["input_shape"]
        return ExportInfo(
            input_shape=(batch, channels, height, width),
            half=body["half"],
            binary_layers=body["binary_layers"],
            openvino=body["openvino"],
            cpu=body["cpu"],
            self_test=_self_test(body["self_test"]),
            sha256=body["sha256"],
            part=body.get("part", ""),
            outputs=tuple(body.get("outputs", (OUTPUT,))),
            fingerprint=body.get("fingerprint", ""),
            real_layers=body.get("real_layers", {}),
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ExportError(f"{place}: not what an export wrote: the file is damaged") from None


def _named(part: str, ways: Mapping[str, str]) -> dict[str, str]:
    """Return what is said of a part's modules by their names in the whole network."""
    return {f"{part}.{name}" if part else name: way for name, way in ways.items()}


def _self_test(body: Mapping[str, Any]) -> SelfTest:
    return SelfTest(**{**body, "outputs": tuple(body.get("outputs", (OUTPUT,)))})


def _to_json(info: ExportInfo) -> dict[str, Any]:
    body = {"format": FORMAT, "version": VERSION, **json.loads(json.dumps(asdict(info)))}
    return {**body, "self": _digest(body)}


def _digest(body: Mapping[str, Any]) -> str:
    return sha256(json.dumps(body, sort_keys=True).encode())


__all__ = [
    "ExportInfo",
    "Exported",
    "export_openvino",
    "has_export",
    "load",
    "prefer_direct_stem",
    "read_info",
    "verify_export",
    "write_ir",
]
