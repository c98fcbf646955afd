"""Training and eval mode of a model, put back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bonn_plugin.errors import ModelError, one_line


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have ``model`` in eval mode within; each module is in its own mode again after.

    Some networks keep tensors that eval mode computes from the weights, such as attention biases, until
    ``train(True)`` is called: that is done in between, so that nothing computed within is used later.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        model.train()
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def run_once(model: nn.Module, example: Tensor) -> None:
    """Run ``model`` on ``example``, (B, C, H, W), in eval mode, for hooks to see.

    Raises:
        ModelError: it does not take the example.
    """
    try:
        with evaluating(model):
            model(example)
    except Exception as error:
        shape = tuple(example.shape)
        raise ModelError(f"the model does not take an input of shape {shape}: {one_line(error)}") from error


def forget_cached(model: nn.Module) -> None:
    """Have ``model`` drop what it has computed from weights and kept, so that it can be copied.

    That is what eval mode keeps, see ``evaluating``; and the graph of tensors that a hook computes anew in each
    forward pass, as torch's pruning masks and older weight norm do.
    """
    with evaluating(model):
        pass
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                setattr(module, name, value.detach())
