"""Which part of a network goes into an export, and how that part is known again."""

from __future__ import annotations

import hashlib

from torch import nn

from bonn_plugin.models import Detector
from bonn_plugin.nn import stored_tensors


def exported_part(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the name and the module of what an engine computes of a network.

    A detector's heads make candidates whose number depends on the image; they and its transform stay in torch, and
    the backbone with its pyramid is exported. Of another network it is the whole, whose name is empty.
    """
    return ("backbone", model.backbone) if isinstance(model, Detector) else ("", model)


def fingerprint(module: nn.Module) -> str:
    """Return the SHA-256 of a module's stored tensors and their names."""
    digest = hashlib.sha256()
    for name, stored in stored_tensors(module):
        tensor = stored.tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


__all__ = ["exported_part", "fingerprint"]
