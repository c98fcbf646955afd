"""What the tests share: small recipes and networks that train in seconds."""

from __future__ import annotations

import signal
import threading

import pytest
import torch

from bonn_plugin import Recipe, parse_recipe

torch.set_num_threads(1)  # the tests run in two processes
if threading.current_thread() is threading.main_thread():
    # a suite that was started in the background ignores Ctrl-C, and so would the commands that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = """
version: 1
name: tiny
model: {name: bonn_wrn22_16, num_classes: 10, args: {depth: 10, widths: [8, 8, 16]}}
data: {name: digits, size: 8}
training:
  epochs: 3
  batch_size: 128
  optimizer: {name: adam, lr: 1e-2}
modifiers:
  - {type: binarize}
  - {type: kernel_loss, lambda: 1e-3, nu: 1e-3}
"""


@pytest.fixture
def tiny() -> Recipe:
    """Three seconds of training on digits of 8 pixels."""
    return parse_recipe(TINY, "tiny.yaml")


def randomize_norms(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give batch norms statistics and affine parameters as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
    return model
