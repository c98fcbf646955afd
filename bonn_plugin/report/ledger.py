"""The ledger: every stored tensor with its role and its bits, and the compression rates by named rules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import safetensors.torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from bonn_plugin.nn import Role, StoredTensor, stored_tensors


class Rule(StrEnum):
    """What a compression rate counts, on both sides of the fraction."""

    PARAMETERS = "parameters"
    WITH_SCALES = "parameters and scales"
    WITH_STATISTICS = "parameters, scales and norm statistics"


RULES: dict[Rule, frozenset[Role]] = {
    Rule.PARAMETERS: frozenset(
        {Role.BINARY_WEIGHT, Role.INTEGER_WEIGHT, Role.INDEX, Role.MASK, Role.REAL_WEIGHT, Role.NORM}
    ),
    Rule.WITH_SCALES: frozenset(Role) - {Role.NORM_STATISTICS},
    Rule.WITH_STATISTICS: frozenset(Role),
}
"""Which roles each rule counts: the parameters of the original network, the index by which outputs share a
filter with the filters that it stands for, the mask of zeros with the weights among which they stand; what
binarisation and quantisation added besides; and running means and variances besides. A norm that a pass folded into
the convolution before it is counted in that one's bias, which stands for the norm's parameters; its running
statistics are counted on neither side."""


class Entry(BaseModel):
    """One stored tensor: its name, shape and role, the bits its numbers need and the bits that are written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role
    elements: int
    bits: int
    needed_bits: int
    written_bits: int
    original_bits: int

    @classmethod
    def of(cls, name: str, stored: StoredTensor) -> Entry:
        """Describe ``stored``."""
        return cls(
            name=name,
            shape=tuple(stored.tensor.shape),
            dtype=str(stored.tensor.dtype).removeprefix("torch."),
            role=stored.role,
            elements=stored.elements,
            bits=stored.bits,
            needed_bits=stored.needed_bits,
            written_bits=stored.written_bits,
            original_bits=stored.original_elements * 32,
        )

    @property
    def module(self) -> str:
        """The module that the tensor belongs to."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Ledger:
    """All stored tensors of a converted model."""

    entries: tuple[Entry, ...]

    def select(self, roles: Iterable[Role]) -> tuple[Entry, ...]:
        """Return the entries of some roles."""
        wanted = frozenset(roles)
        return tuple(entry for entry in self.entries if entry.role in wanted)

    def within(self, module: str) -> Ledger:
        """Return the ledger of a submodule."""
        return Ledger(tuple(entry for entry in self.entries if entry.name.startswith(f"{module}.")))

    def rate(self, rule: Rule = Rule.PARAMETERS) -> float:
        """Return float32 bits of the original network over the bits needed now, under ``rule``."""
        counted = self.select(RULES[rule])
        needed = sum(entry.needed_bits for entry in counted)
        return sum(entry.original_bits for entry in counted) / needed if needed else 1.0

    def bits(self, role: Role) -> int:
        """Return the bits that the tensors of ``role`` need."""
        return sum(entry.needed_bits for entry in self.select([role]))

    @property
    def written_bytes(self) -> int:
        """Bytes of all tensors as written, without the file's header."""
        return sum(entry.written_bits for entry in self.entries) // 8


def ledger(model: nn.Module) -> Ledger:
    """Return the ledger of a converted model (of any other, what saving it as it is would store)."""
    return Ledger(tuple(Entry.of(name, stored) for name, stored in stored_tensors(model)))


def float32_file_bytes(model: nn.Module) -> int:
    """Return the size of ``model``'s whole state dict as a .safetensors file, in bytes: what one saves without us."""
    return len(safetensors.torch.save({name: t.contiguous() for name, t in model.state_dict().items()}))
