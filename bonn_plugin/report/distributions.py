"""How the latent weights of each binarised layer lie at some moments of a run: distributions.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bonn_plugin.errors import BonnError

DISTRIBUTIONS = "distributions.jsonl"
"""The file's name in a run's folder."""
OPTION = "--log-distributions"
"""The option of ``bonn compress`` that records it."""

Magnitude = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LayerDistribution(BaseModel):
    """The latent weights X of one layer.

    Attributes:
        mean_abs: mean |X|.
        scale: the binarised value w̄; the mean over the filters where there are several.
        counts: weights below the range, in each bin of X / mean_abs, and above the range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean_abs: Magnitude
    scale: Annotated[float, Field(allow_inf_nan=False)]
    counts: tuple[Annotated[int, Field(ge=0)], ...]

    @property
    def total(self) -> int:
        """All weights of the layer."""
        return sum(self.counts)

    @property
    def outside(self) -> float:
        """The share of the weights that lie outside the range, from 0 to 1."""
        return (self.counts[0] + self.counts[-1]) / self.total


class Moment(BaseModel):
    """One line: all layers after so many finished epochs.

    Attributes:
        epoch: finished epochs; 0 before the training.
        bins: lowest edge, highest edge and number of the bins, in units of ``mean_abs``.
        layers: by name, in the order of the network.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: Annotated[int, Field(ge=0)]
    bins: tuple[float, float, Annotated[int, Field(ge=1, le=4096)]]
    layers: Annotated[dict[str, LayerDistribution], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        low, high, number = self.bins
        if not low < high:
            raise ValueError(f"bins from {low} to {high}")
        for name, layer in self.layers.items():
            if len(layer.counts) != number + 2:
                raise ValueError(
                    f"{name} has {len(layer.counts)} counts, {number} bins and two sides need {number + 2}"
                )
            if not layer.total:
                raise ValueError(f"{name} has no weights")
        return self

    def shares(self, name: str, join: int = 1) -> tuple[tuple[float, float], ...]:
        """Return the middle of each bin and the share of a layer's weights in it, from 0 to 1.

        Args:
            name: the layer.
            join: so many neighbouring bins are taken as one; it divides their number.
        """
        low, high, number = self.bins
        layer, width = self.layers[name], (high - low) / number * join
        inside = layer.counts[1:-1]
        return tuple(
            (low + (i + 0.5) * width, sum(inside[i * join : (i + 1) * join]) / layer.total)
            for i in range(number // join)
        )

    def valley(self, name: str) -> float:
        """Return the density near 0 over the density near the mean magnitude, as ``nn.distribution.valley`` has it.

        Taken from the bins whose middle lies in the range: exact where their edges are multiples of a quarter.
        """
        shares = self.shares(name)
        bottom = [share for middle, share in shares if abs(middle) < 0.25]
        mode = [share for middle, share in shares if 0.75 <= abs(middle) < 1.25]
        return (sum(bottom) / 0.25) / max(sum(mode) / 0.5, 1e-12)


def read_distributions(path: Path) -> tuple[Moment, ...]:
    """Read a run's distributions.jsonl: at least one moment, epochs rising, the same layers and bins in each.

    Raises:
        BonnError: it can't be read, or a line is damaged.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise BonnError(f"{path}: can't be read: {error.strerror}; bonn compress {OPTION} writes it") from None
    moments: list[Moment] = []
    for number, line in enumerate(lines, 1):
        try:
            moment = Moment.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            place = "".join(f"{part}: " for part in first["loc"])
            raise BonnError(f"{path}:{number}: damaged: {place}{first['msg']}") from None
        if moments:
            before = moments[-1]
            if moment.epoch <= before.epoch:
                raise BonnError(f"{path}:{number}: damaged: epoch {moment.epoch} after epoch {before.epoch}")
            if (moment.bins, list(moment.layers)) != (before.bins, list(before.layers)):
                raise BonnError(f"{path}:{number}: damaged: other layers or bins than in the line before")
        moments.append(moment)
    if not moments:
        raise BonnError(f"{path}: empty; bonn compress {OPTION} writes it")
    return tuple(moments)
