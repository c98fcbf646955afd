"""Interleaved timing: every candidate meets the same moods of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

CHUNK = 0.03
"""Seconds that one candidate runs before the next has its turn."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median and 95th percentile over ``calls`` calls."""

    median: float
    p95: float
    calls: int


def time_interleaved(
    candidates: Mapping[str, Callable[[], object]], seconds: float, *, least_rounds: int = 3
) -> dict[str, Timing]:
    """Time callables in turns.

    Args:
        candidates: by name.
        seconds: measuring time for each.
        least_rounds: turns that each gets at least, however slow it is.
    """
    calls: dict[str, list[float]] = {name: [] for name in candidates}
    repeats = {}
    for name, run in candidates.items():
        run()
        run()
        repeats[name] = max(1, round(CHUNK / max(_once(run), 1e-6)))
    rounds = 0
    end = time.perf_counter() + seconds * len(candidates)
    while rounds < least_rounds or time.perf_counter() < end:
        rounds += 1
        for name, run in candidates.items():
            if repeats[name] > 1:
                run()  # the first call finds the caches full of another's data
            calls[name] += [_once(run) for _ in range(repeats[name])]
    return {name: _summary(values) for name, values in calls.items()}


def _once(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _summary(values: list[float]) -> Timing:
    high = quantiles(values, n=20)[-1] if len(values) > 1 else values[0]
    return Timing(median(values), high, len(values))


__all__ = ["Timing", "time_interleaved"]
