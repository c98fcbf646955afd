"""What the training convolutions with 1-bit activations have in common: the threshold of their input's sign."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bonn_plugin.collective import mean_over_ranks
from bonn_plugin.functional import Ste, binarize_activation
from bonn_plugin.nn.geometry import ConvAttributes, ConvGeometry

THRESHOLD_BATCHES = 8
"""Training batches from which a learned threshold takes its first value."""


class SignInput(ConvAttributes, nn.Module):
    """Takes the sign of its input, with a learned threshold per channel where it is given one.

    ``binarizes_input`` tells a network to leave out the activation before it; ``takes_signs`` whether it is signs that
    it reads: a subclass may read something else.

    Args:
        conv: the convolution to replace; its ``weight`` (and ``bias``) become this module's, the
            very same Parameter, so that names and optimizers go on.
        ste: gradient of the activation's sign, ``"clip"`` or ``"polynomial"``.
        bound: half width of the clip.

    Raises:
        ValueError: the convolution's padding is not zeros, or differs between the two sides.
    """

    binarizes_input = True
    takes_signs = True
    threshold_batches: Tensor

    def __init__(self, conv: nn.Conv2d, ste: Ste, bound: float) -> None:
        super().__init__()
        self.geometry = ConvGeometry.of(conv)
        self.ste: Ste = ste
        self.bound = bound
        self.weight = conv.weight
        self.bias = conv.bias
        self.threshold: nn.Parameter | None = None
        self._batches_left: int | None = 0

    def after_step(self) -> None:
        """Do what the method does once the optimizer has moved: nothing, but in a subclass."""

    def add_threshold(self, *, from_input: bool = True) -> None:
        """Give the layer a threshold per input channel, (C_in,).

        Its first value is the channel's mean over the first ``THRESHOLD_BATCHES`` training batches of all processes;
        without ``from_input`` it is 0, as in RSign of ReActNet (ECCV 2020).
        """
        self.threshold = nn.Parameter(self.weight.detach().new_zeros(self.geometry.in_channels))
        seen = 0 if from_input else THRESHOLD_BATCHES
        self.register_buffer("threshold_batches", self.weight.new_full((), seen, dtype=torch.long))
        self._batches_left = None

    def input_signs(self, x: Tensor) -> Tensor:
        """Return sign(x - t), ±1 in the shape of ``x``, (B, C_in, H, W)."""
        if self.threshold is not None:
            if self.training and self._batches_left != 0:
                self._follow_input(x)
            x = x - self.threshold.to(x.dtype)[:, None, None]
        return binarize_activation(x, self.ste, self.bound)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _follow_input(self, x: Tensor) -> None:
        assert self.threshold is not None
        if self._batches_left is None:  # read once after its value was set: no host sync in each step
            self._batches_left = max(0, THRESHOLD_BATCHES - int(self.threshold_batches))
        if self._batches_left:
            self._batches_left -= 1
            self.threshold_batches += 1
            wide = torch.promote_types(x.dtype, torch.float32)
            mean = mean_over_ranks(x.mean((0, 2, 3), dtype=wide)).to(self.threshold.dtype)
            self.threshold.lerp_(mean, 1 / (THRESHOLD_BATCHES - self._batches_left))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.threshold is not None:
            self._batches_left = None

    @property
    def awaits_threshold(self) -> bool:
        """Whether its threshold has not been set from any batch yet."""
        return self.threshold is not None and int(self.threshold_batches) == 0

    @classmethod
    def names_in(cls, model: nn.Module) -> list[str]:
        """Return the names of the modules of this class in ``model``, in order."""
        return [name for name, module in model.named_modules() if isinstance(module, cls)]

    def extra_repr(self) -> str:
        """Return the line that ``print(model)`` shows."""
        return f"{self.geometry}, ste={self.ste}, threshold={self.threshold is not None}"


__all__ = ["THRESHOLD_BATCHES", "SignInput"]
