"""Packed checkpoints: a folder that rebuilds the model by itself, and says when it is damaged.

``model.safetensors`` holds the tensors, ``config.json`` the network's name, what stands where in it, the
checksums, and the logits of a probe, or what else a network has to prove itself by; ``recipe.yaml`` how it was
made. Nothing in it is executed.
"""

from __future__ import annotations

import base64
import json
import os
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

import numpy as np
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from bonn_plugin.errors import CheckpointError, one_line
from bonn_plugin.files import sha256, write_files
from bonn_plugin.models import ModelBuildError
from bonn_plugin.nn import Replacement, replace_module, replacement_class, stored_tensors
from bonn_plugin.nn.resize import note_unpruned, resize, size_of, unpruned
from bonn_plugin.recipe import AnyModelConfig, NetworkConfig, Recipe, build_network, dump_recipe

FORMAT = "bonn-packed-checkpoint"
VERSION = 1
WEIGHTS, CONFIG, RECIPE = "model.safetensors", "config.json", "recipe.yaml"
STATE_PARTS = {
    "session": dict,
    "model": OrderedDict,
    "optimizer": dict,
    "scaler": dict,
    "ema": dict,
    "metrics": list,
    "epoch": dict,
}
"""What a training state holds."""
PROBE_IMAGES = 2
TOLERANCE = 1e-3
"""Largest relative difference of logits that another machine's float arithmetic explains."""


@runtime_checkable
class Probing(Protocol):
    """A model whose outputs are not logits, and that has numbers to prove a copy of it equal."""

    def probe(self, images: Tensor) -> Tensor:
        """Return them for ``images``, (B, C, H, W), in eval mode."""
        ...


class _Probe(BaseModel):
    """Shape (B, C, H, W) of the probe's images, and its logits: float32, little-endian, base64."""

    model_config = ConfigDict(strict=True, frozen=True)
    shape: Annotated[list[Annotated[int, Field(ge=1, le=65_536)]], Field(min_length=4, max_length=4)]
    logits: str


class _Pruned(BaseModel):
    """A module that lost channels: its size now, None where its replacement tells it, and its elements before."""

    model_config = ConfigDict(strict=True, frozen=True)
    size: dict[str, dict[str, Any]] | None
    elements: dict[str, Annotated[int, Field(ge=1)]]


class _Manifest(BaseModel):
    """What config.json must hold, whoever wrote it."""

    model_config = ConfigDict(strict=True, frozen=True)
    model: AnyModelConfig
    modules: dict[str, dict[str, Any]]
    pruned: dict[str, _Pruned] = Field(default_factory=dict)
    sha256: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")], str]
    probe: _Probe


@dataclass(frozen=True)
class Verification:
    """What ``verify_packed`` found.

    Attributes:
        tensors: tensors read.
        bytes: size of the weights' file.
        identical: the probe's logits are equal bit for bit.
        difference: the largest difference of a logit; 0 when identical.
    """

    tensors: int
    bytes: int
    identical: bool
    difference: float


def save_packed(model: nn.Module, path: str | os.PathLike[str], source: Recipe | NetworkConfig) -> Path:
    """Write a converted model as a folder that ``load_packed`` rebuilds.

    Args:
        model: what ``Session.convert`` returned.
        path: the folder; made if it is not there.
        source: the recipe, or at least which network it is.

    Returns:
        The folder.

    Raises:
        CheckpointError: the model is still in training form, or the disk does not take the files; what was
            in the folder before stays.
    """
    config = source.model if isinstance(source, Recipe) else source
    unpacked = [name for name, module in model.named_modules() if hasattr(module, "pack")]
    if unpacked:
        raise CheckpointError(f"{unpacked[0]} is still in training form: save what session.convert() returns")
    tensors = {name: stored.tensor.detach().cpu().contiguous() for name, stored in stored_tensors(model)}
    weights = safetensors.torch.save(tensors)
    recipe = dump_recipe(source).encode() if isinstance(source, Recipe) else None
    image = (PROBE_IMAGES, *_input_shape(model, source))
    body: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "made_by": f"bonn_plugin {_own_version()}",
        "model": config.model_dump(mode="json", exclude={"init_from"}),
        "modules": {
            name: {"kind": module.kind, **module.spec()}
            for name, module in model.named_modules()
            if isinstance(module, Replacement)
        },
        **_pruned(model),
        "sha256": {WEIGHTS: sha256(weights)},
        "probe": {"shape": list(image), "logits": _encode(_probe(model, image))},
    }
    contents = {WEIGHTS: weights}
    if recipe is not None:
        body["sha256"][RECIPE] = sha256(recipe)
        contents[RECIPE] = recipe
    body["self"] = _digest(body)
    contents[CONFIG] = (json.dumps(body, indent=1) + "\n").encode()
    folder = Path(path)
    write_files(folder, contents)
    return folder


def load_packed(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> nn.Module:
    """Rebuild the model of a checkpoint folder, in eval mode.

    Raises:
        CheckpointError: a file is missing, damaged, of another kind, or of a later version.
    """
    folder = Path(path)
    config = _read_config(folder)
    return _build(folder, config).to(device)


def verify_packed(path: str | os.PathLike[str]) -> Verification:
    """Check every checksum of a folder, rebuild the model and compare its logits with those at saving.

    Raises:
        CheckpointError: something is damaged, or the logits differ by more than float arithmetic explains.
    """
    folder = Path(path)
    config = _read_config(folder)
    for name in config["sha256"]:
        _read(folder, name, config)
    model = _build(folder, config)
    shape = tuple(config["probe"]["shape"])
    try:
        now = _probe(model, shape)
        then = _decode(config["probe"]["logits"], now)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG}: the probe does not fit the model: {one_line(error)}") from error
    difference = float((now - then).abs().max())
    scale = float(then.abs().max().clamp(min=1.0))
    if not difference <= TOLERANCE * scale:
        raise CheckpointError(
            f"{folder}: the logits of the probe differ by {difference:.3g} from those at saving: "
            "the files are not what was saved"
        )
    size = (folder / WEIGHTS).stat().st_size
    return Verification(len(list(stored_tensors(model))), size, bool(torch.equal(now, then)), difference)


def load_recipe_of(path: str | os.PathLike[str]) -> str | None:
    """Return the text of the recipe that a checkpoint folder carries, None if it carries none."""
    folder = Path(path)
    config = _read_config(folder)
    return _read(folder, RECIPE, config).decode() if RECIPE in config["sha256"] else None


def model_config_of(path: str | os.PathLike[str]) -> NetworkConfig:
    """Return which network a checkpoint folder holds."""
    return _model_config(_read_config(Path(path)))


def input_shape_of(path: str | os.PathLike[str]) -> tuple[int, int, int]:
    """Return (C, H, W) of the images that a checkpoint folder was trained for."""
    channels, height, width = _read_config(Path(path))["probe"]["shape"][1:]
    return int(channels), int(height), int(width)


def load_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return weights to start from, by name.

    Args:
        path: a .safetensors file, or a folder: a run's (its latent weights) or a packed checkpoint (its ±w̄).

    Raises:
        CheckpointError: there is nothing of the kind.
    """
    place = Path(path)
    if place.is_dir():
        state = place / "training" / "state.pt"
        if state.exists():
            return _unmasked(load_state(state)["model"])
        return _dense_state(load_packed(place), place)
    return _parse(_read_file(place), place)


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state; only tensors and plain values are accepted.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load compares no checksums
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:
        raise CheckpointError(f"{path}: not a training state, or damaged: {one_line(error)}") from error
    if damaged:
        raise CheckpointError(f"{path}: damaged: the checksum of {damaged} is wrong")
    if not isinstance(state, dict) or {key: type(value) for key, value in state.items()} != STATE_PARTS:
        raise CheckpointError(f"{path}: not a training state of this package")
    return state


def _unmasked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a training state by the names they have without masks, zeros where these are."""
    latent, mask = ".parametrizations.weight.original", ".parametrizations.weight.0.mask"
    weights = {name: tensor for name, tensor in state.items() if not name.endswith((latent, mask))}
    for name, tensor in state.items():
        if name.endswith(latent):
            layer = name.removesuffix(latent)
            weights[f"{layer}.weight"] = tensor * state[layer + mask]
    return weights


_REPRESENTATION = ("weight", "input_")
"""Beginnings of the local names of tensors that are replaced by ``dense_weight``."""


def _dense_state(model: nn.Module, place: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    dense: set[str] = set()
    for name, module in model.named_modules():
        if getattr(module, "folded", False):
            raise CheckpointError(
                f"{place}: {name} was folded into an int8 convolution, so that no training can start from it: "
                "give the run's folder or a checkpoint without int8"
            )
        dense_weight = getattr(module, "dense_weight", None)
        if callable(dense_weight):
            dense.add(name)
            state[f"{name}.weight"] = dense_weight()
    for name, stored in stored_tensors(model):
        module_name, _, local = name.rpartition(".")
        if not (module_name in dense and local.startswith(_REPRESENTATION)):
            state[name] = stored.tensor.detach()
    return state


def _read_config(folder: Path) -> dict[str, Any]:
    place = folder / CONFIG
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if not place.exists():
        raise CheckpointError(f"{place}: missing; {folder} is not a packed checkpoint, or it was never finished")
    content = _read_file(place)
    try:
        config = json.loads(content)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{place}: not JSON: the file is damaged") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{place}: not the configuration of a packed checkpoint")
    if config.get("version") != VERSION:
        raise CheckpointError(
            f"{place}: checkpoint version {config.get('version')!r}; this package reads version {VERSION}: update it"
        )
    body = {key: value for key, value in config.items() if key != "self"}
    if config.get("self") != _digest(body):
        raise CheckpointError(f"{place}: the checksum is wrong: the file was changed or damaged")
    try:
        _Manifest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        section, *inner = first["loc"]  # of the model pydantic names the task too, where the file has no such level
        where = ".".join(map(str, (section, *(inner[1:] if section == "model" else inner))))
        raise CheckpointError(f"{place}: not the configuration of a checkpoint: {where}: {first['msg']}") from None
    return config


def _model_config(config: Mapping[str, Any]) -> NetworkConfig:
    return TypeAdapter[NetworkConfig](AnyModelConfig).validate_python(config["model"])


def _build(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    try:
        model = build_network(_model_config(config))
    except ModelBuildError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    for name, entry in config.get("pruned", {}).items():
        try:
            module = model.get_submodule(name)
            if entry["size"] is not None:
                resize(module, entry["size"])
            note_unpruned(module, entry["elements"])
        except Exception as error:
            raise CheckpointError(f"{folder / CONFIG}: module {name!r} can't be resized: {one_line(error)}") from error
    for name, entry in config["modules"].items():
        try:
            cls = replacement_class(entry["kind"])
            model.get_submodule(name)
            module = cls.from_spec({key: value for key, value in entry.items() if key != "kind"})
        except Exception as error:
            raise CheckpointError(f"{folder / CONFIG}: module {name!r} can't be rebuilt: {one_line(error)}") from error
        replace_module(model, name, module)
    tensors = _parse(_read(folder, WEIGHTS, config), folder / WEIGHTS)
    _fill(model, tensors, folder / WEIGHTS)
    return model.eval()


def _pruned(model: nn.Module) -> dict[str, Any]:
    """Return the section on channels that were taken away; nothing where none were."""
    found = {
        name: {
            "size": None if isinstance(module, Replacement) else size_of(module),
            "elements": dict(unpruned(module)),
        }
        for name, module in model.named_modules()
        if unpruned(module)
    }
    return {"pruned": found} if found else {}


@torch.no_grad()
def _fill(model: nn.Module, tensors: Mapping[str, Tensor], place: Path) -> None:
    wanted = {name: stored.tensor for name, stored in stored_tensors(model)}
    for name in wanted.keys() - tensors.keys():
        raise CheckpointError(f"{place}: tensor {name!r} is missing")
    for name in tensors.keys() - wanted.keys():
        raise CheckpointError(f"{place}: tensor {name!r} has no place in the model")
    for name, target in wanted.items():
        given = tensors[name]
        if given.shape != target.shape or given.dtype != target.dtype:
            raise CheckpointError(
                f"{place}: tensor {name!r} is {given.dtype} {tuple(given.shape)}, "
                f"the model needs {target.dtype} {tuple(target.shape)}"
            )
        target.copy_(given)


def _read(folder: Path, name: str, config: Mapping[str, Any]) -> bytes:
    content = _read_file(folder / name)
    if sha256(content) != config["sha256"].get(name):
        if name == WEIGHTS:
            _refuse_pickle(content, folder / name)
        raise CheckpointError(
            f"{folder / name}: the checksum is wrong: the file is truncated, damaged or from another checkpoint"
        )
    return content


def _read_file(place: Path) -> bytes:
    try:
        return place.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{place}: can't be read: {error.strerror}") from None


def _parse(content: bytes, place: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        _refuse_pickle(content, place)
        raise CheckpointError(f"{place}: not a safetensors file, or damaged: {one_line(error)}") from None


def _refuse_pickle(content: bytes, place: Path) -> None:
    """Say what a file is that failed as safetensors, where it is a pickle or torch's archive of one.

    Only for a file that failed: safetensors begin with the length of their header, and that may be
    0x80 0x02, as a pickle begins, or "PK", as an archive does.
    """
    pickled = content[:1] == b"\x80" and content[1:2] in b"\x02\x03\x04\x05" and content[2:8] != bytes(6)
    if content[:4] == b"PK\x03\x04" or pickled:
        raise CheckpointError(f"{place}: a pickle, not safetensors: loading it could run code, so it is refused")


def _digest(body: Mapping[str, Any]) -> str:
    return sha256(json.dumps(body, sort_keys=True).encode())


def _input_shape(model: nn.Module, source: Recipe | NetworkConfig) -> tuple[int, int, int]:
    settings: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    channels, *size = settings.get("input_size", (3, 224, 224))
    args = source.model.args if isinstance(source, Recipe) else source.args
    channels = int(args.get("in_chans", channels))
    if isinstance(source, Recipe):
        return channels, source.data.image_size, source.data.image_size
    return channels, int(size[0]), int(size[1])


@torch.no_grad()
def _probe(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Logits, or what a model has in their place, of noise; numpy keeps its generators' streams over releases."""
    noise = np.random.Generator(np.random.PCG64(0)).random(shape, dtype=np.float32) * 4 - 2
    device = next((t.tensor.device for _, t in stored_tensors(model)), torch.device("cpu"))
    training = model.training
    model.eval()
    images = torch.from_numpy(noise).to(device)
    logits: Tensor = model.probe(images) if isinstance(model, Probing) else model(images)
    model.train(training)
    return logits.float().cpu()


def _encode(logits: Tensor) -> str:
    return base64.b64encode(logits.numpy().astype("<f4").tobytes()).decode()


def _decode(text: str, like: Tensor) -> Tensor:
    flat = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")
    if flat.size != like.numel():
        raise ValueError(f"{flat.size} logits were saved, the model gives {like.numel()}")
    return torch.from_numpy(flat.copy()).view_as(like)


def _own_version() -> str:
    try:
        return version("bonn_plugin")
    except PackageNotFoundError:
        return "(not installed)"
