"""What a run has noted of the epoch under way: sums of losses, time, and the steps that were not looked at yet."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bonn_plugin.collective import mean_over_ranks
from bonn_plugin.train.world import World


@dataclass(frozen=True)
class BadLoss:
    """A step whose loss is not finite.

    Attributes:
        step: of the epoch, from 0.
        what: which loss, in words.
    """

    step: int
    what: str


@dataclass
class Book:
    """Sums over the steps of an epoch that moved the optimizer.

    Attributes:
        sums: of each loss, scalars on the device.
        counted: how many steps are in each sum.
        skipped: steps of the whole run that were left out.
        record: what is known of a finished epoch that was not measured yet; empty before.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    counted: int = 0
    skipped: int = 0
    record: dict[str, Any] = field(default_factory=dict)
    _before: float = 0.0
    _began: float = field(default_factory=time.perf_counter)
    _unseen: list[tuple[int, Mapping[str, Tensor]]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Time that the epoch took until now, over all goes."""
        return self._before + time.perf_counter() - self._began

    def begin(self) -> None:
        """Begin an epoch."""
        self.sums, self.counted, self.record = {}, 0, {}
        self._before, self._began = 0.0, time.perf_counter()
        self._unseen = []

    def add(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """Note the losses of a step; nothing waits for the device."""
        for name, value in losses.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.counted += 1
        self._unseen.append((step, losses))

    def look(self, world: World, stop: bool) -> tuple[BadLoss | None, bool]:
        """Wait for the device and look at the steps since the last look, with all processes.

        Returns:
            The first bad step of any process, and whether any process was asked to stop.
        """
        own: tuple[int, str, float] | None = None
        for step, losses in self._unseen:
            values = torch.stack(list(losses.values())).tolist()
            bad = [(n, v) for n, v in zip(losses, values, strict=True) if not math.isfinite(v)]
            if bad:
                own = (step, *bad[0])
                break
        self._unseen = []
        never = -math.inf if own is None else -float(own[0])
        first, asked = world.most([never, float(stop)])
        if first == -math.inf:
            return None, asked > 0
        step = int(-first)
        what = "a loss of another process is not finite"
        if own is not None and own[0] == step:
            what = f"the {own[1]} loss is {own[2]}"
        return BadLoss(step, what), asked > 0

    def means(self) -> dict[str, float]:
        """Return the mean of each loss over the counted steps and over all processes."""
        self._share_sums()
        return {name: float(value) / max(1, self.counted) for name, value in self.sums.items()}

    def state_dict(self, processes: int) -> dict[str, Any]:
        """Return what ``load_state_dict`` needs; all processes call it together."""
        self._share_sums()
        return {
            "sums": self.sums,
            "counted": self.counted,
            "skipped": self.skipped,
            "record": self.record,
            "seconds": self.seconds,
            "processes": processes,
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take back what ``state_dict`` returned."""
        self.sums = {str(name): value.to(device) for name, value in state["sums"].items()}
        self.counted, self.skipped = int(state["counted"]), int(state["skipped"])
        self.record = dict(state["record"])
        self._before, self._began = float(state["seconds"]), time.perf_counter()
        self._unseen = []

    def _share_sums(self) -> None:
        self.sums = {name: mean_over_ranks(value) for name, value in self.sums.items()}
