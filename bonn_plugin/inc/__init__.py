"""The face to Intel neural-compressor: importing it registers ``bonn_pruning`` and ``bonn`` with that framework.

Use them as any configuration of that framework::

    from neural_compressor.torch.quantization import prepare, convert
    from bonn_plugin.inc import BonnConfig, BonnPruningConfig, kernel_loss, pruning_loss

    model = prepare(model, BonnConfig() + BonnPruningConfig(keep=0.5), example_inputs=images)
    ...  # train; loss = criterion(model(x), y) + kernel_loss(model) + pruning_loss(model, progress)
    model = convert(model)
    save_packed(model, "out", ModelConfig(name="resnet18", num_classes=1000))

Two traps of the framework: its ``load`` returns None for an algorithm that is not its own (use ``load_packed``), and a
dictionary with two algorithms keeps only the first, in silence (use ``config_from_dict``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import add
from typing import Any

# The framework runs algorithms in the order of their registration: pruning first, then packing.
from bonn_plugin.inc.pruning import BonnPruningConfig, pruning_loss  # isort: skip
from bonn_plugin.inc.quantizer import BonnConfig, kernel_loss  # isort: skip
from bonn_plugin.errors import BonnError
from bonn_plugin.inc.base import SelectorConfig
from bonn_plugin.modifiers import near_names


def config_from_dict(settings: Mapping[str, Any]) -> Any:
    """Return the configuration of a dictionary with one of our algorithms or both.

    Args:
        settings: ``{"bonn": {...}, "bonn_pruning": {...}}``, each part flat or of ``global`` and ``local``.

    Raises:
        BonnError: a key that is no algorithm of ours, or a setting that makes no sense.
    """
    classes: dict[str, type[SelectorConfig]] = {BonnConfig.name: BonnConfig, BonnPruningConfig.name: BonnPruningConfig}
    for key in settings:
        if key not in classes:
            raise BonnError(f"{key!r} is no algorithm of this package.{near_names(str(key), list(classes))}")
    if not settings:
        raise BonnError("an empty configuration: name 'bonn', 'bonn_pruning' or both")
    return reduce(add, (classes[key].from_dict(value or {}) for key, value in settings.items()))


__all__ = ["BonnConfig", "BonnPruningConfig", "config_from_dict", "kernel_loss", "pruning_loss"]
