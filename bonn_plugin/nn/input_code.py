"""What a 1-bit convolution reads where that is not the sign of its input: real, k-bit, ternary or several signs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bonn_plugin.functional.methods import abc_inputs, dorefa_input, first_shifts, ternarize_input
from bonn_plugin.nn.operations import Macs
from bonn_plugin.nn.storage import Role, StoredTensor

MOST_BITS = 8


class InputCode(nn.Module):
    """Codes an input, (B, C, H, W), as a sum over n of factors_n * codes_n.

    Attributes:
        kind: its name in a checkpoint.
        bends: whether it is an activation function itself, so that none stands before it.
        large: whether sums of its codes leave the range of half precision.
    """

    kind: ClassVar[str]
    bends: ClassVar[bool] = True
    large: ClassVar[bool] = False

    def codes(self, x: Tensor) -> list[Tensor]:
        """Return what is convolved, one or several in the shape of ``x``."""
        raise NotImplementedError

    def factors(self) -> Tensor | None:
        """Return what their convolutions are multiplied by, (N,); None for 1."""
        return None

    @property
    def words(self) -> str:
        """What it makes of an input, for a reader."""
        raise NotImplementedError

    def macs(self, count: int) -> Macs:
        """Count the operations of ``count`` multiply-accumulates with one base of ±1 weights."""
        raise NotImplementedError

    def stored_tensors(self) -> Mapping[str, StoredTensor]:
        """Declare what a checkpoint holds of it."""
        return {}

    def spec(self) -> dict[str, Any]:
        """Return the JSON-ready form that ``input_code`` reads."""
        return {"kind": self.kind}


class RealInput(InputCode):
    """x itself (BWN)."""

    kind = "real"
    bends = False

    def codes(self, x: Tensor) -> list[Tensor]:
        """Return [x]."""
        return [x]

    @property
    def words(self) -> str:
        """See ``InputCode``."""
        return "real numbers"

    def macs(self, count: int) -> Macs:
        """Count real ones: ±1 only decides between adding and subtracting, and still it is a float that is added."""
        return Macs(real=count)


class BitsInput(InputCode):
    """round((2^k - 1) clip(x, 0, 1)) / (2^k - 1) (DoReFa-Net).

    Args:
        bits: k, 1 to 8.

    Raises:
        ValueError: another k.
    """

    kind = "bits"
    bends = False
    large = True

    def __init__(self, bits: int) -> None:
        super().__init__()
        if type(bits) is not int or not 1 <= bits <= MOST_BITS:
            raise ValueError(f"activations of {bits!r} bits: 1 to {MOST_BITS}")
        self.bits = bits

    def codes(self, x: Tensor) -> list[Tensor]:
        """Return whole numbers from 0 to 2^k - 1."""
        return [dorefa_input(x, self.bits)]

    def factors(self) -> Tensor | None:
        """Return 1 / (2^k - 1)."""
        return torch.tensor([1 / (2**self.bits - 1)])

    @property
    def words(self) -> str:
        """See ``InputCode``."""
        return f"{self.bits} bits of [0, 1]"

    def macs(self, count: int) -> Macs:
        """Count one binary operation for each bit of the input."""
        return Macs(binary=count * self.bits)

    def spec(self) -> dict[str, Any]:
        """See ``InputCode``."""
        return {"kind": self.kind, "bits": self.bits}

    def extra_repr(self) -> str:
        """Return the line that ``print(model)`` shows."""
        return f"{self.bits}"


class TernaryInput(InputCode):
    """-1, 0 or +1 (TBN).

    Args:
        delta: the edge, as a share of the mean of |x|.

    Raises:
        ValueError: it is not a number from 0.
    """

    kind = "ternary"

    def __init__(self, delta: float) -> None:
        super().__init__()
        if not isinstance(delta, (int, float)) or not 0 <= delta < float("inf"):
            raise ValueError(f"delta {delta!r} is not a number from 0")
        self.delta = float(delta)

    def codes(self, x: Tensor) -> list[Tensor]:
        """Return -1, 0 and +1."""
        return [ternarize_input(x, self.delta)]

    @property
    def words(self) -> str:
        """See ``InputCode``."""
        return "-1, 0 or +1"

    def macs(self, count: int) -> Macs:
        """Count two binary operations: three values take two bits."""
        return Macs(binary=2 * count)

    def spec(self) -> dict[str, Any]:
        """See ``InputCode``."""
        return {"kind": self.kind, "delta": self.delta}

    def extra_repr(self) -> str:
        """Return the line that ``print(model)`` shows."""
        return f"{self.delta:g}"


class ShiftedSigns(InputCode):
    """Several signs, each at a learned place and with a learned factor (ABC-Net).

    Parameters: ``shifts`` v, of the role "threshold", and ``weights`` beta, (N,) each.

    Args:
        count: N, from 1.

    Raises:
        ValueError: another N.
    """

    kind = "signs"
    parameter_roles: ClassVar[dict[str, str]] = {"shifts": "threshold"}

    def __init__(self, count: int) -> None:
        super().__init__()
        if type(count) is not int or not 1 <= count <= MOST_BITS:
            raise ValueError(f"{count!r} signs of an input: 1 to {MOST_BITS}")
        self.shifts = nn.Parameter(first_shifts(count))
        self.weights = nn.Parameter(torch.full((count,), 1 / count))

    def codes(self, x: Tensor) -> list[Tensor]:
        """Return N times ±1."""
        return abc_inputs(x, self.shifts)

    def factors(self) -> Tensor | None:
        """Return beta."""
        return self.weights

    @property
    def words(self) -> str:
        """See ``InputCode``."""
        return f"{self.shifts.numel()} shifted signs"

    def macs(self, count: int) -> Macs:
        """Count one binary operation for each sign."""
        return Macs(binary=count * self.shifts.numel())

    def stored_tensors(self) -> Mapping[str, StoredTensor]:
        """Declare v and beta."""
        return {
            "shifts": StoredTensor.real(self.shifts, Role.THRESHOLD, added=True),
            "weights": StoredTensor.real(self.weights, Role.SCALE, added=True),
        }

    def spec(self) -> dict[str, Any]:
        """See ``InputCode``."""
        return {"kind": self.kind, "count": self.shifts.numel()}

    def extra_repr(self) -> str:
        """Return the line that ``print(model)`` shows."""
        return f"{self.shifts.numel()}"


def input_code(spec: Any) -> InputCode:
    """Build a code from its ``spec``, its tensors still to be loaded. Raises ValueError on one that makes no sense."""
    if not isinstance(spec, Mapping):
        raise ValueError(f"not the input code of a layer: {spec!r}")
    kind = spec.get("kind")
    if kind == RealInput.kind:
        return RealInput()
    if kind == BitsInput.kind:
        return BitsInput(spec.get("bits"))  # type: ignore[arg-type]
    if kind == TernaryInput.kind:
        return TernaryInput(spec.get("delta"))  # type: ignore[arg-type]
    if kind == ShiftedSigns.kind:
        return ShiftedSigns(spec.get("count"))  # type: ignore[arg-type]
    raise ValueError(f"unknown input code {kind!r}")


__all__ = ["BitsInput", "InputCode", "RealInput", "ShiftedSigns", "TernaryInput", "input_code"]
