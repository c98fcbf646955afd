"""The Pareto front of points that cost something and gain something."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> tuple[bool, ...]:
    """Return for each point (cost, gain) whether no other one dominates it.

    A point dominates another that costs at least as much and gains at most as much, unless they are equal: of equal
    points all are on the front, or none. O(n log n). Values must not be NaN.

    >>> pareto_front([(1, 5), (2, 5), (2, 7), (1, 5)])
    (True, False, True, True)
    """
    best_cheaper = best = float("-inf")
    cost_so_far = float("-inf")
    on_front = [False] * len(points)
    # the cheapest first, and of one cost the best first
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        cost, gain = points[i]
        if cost > cost_so_far:
            best_cheaper, best, cost_so_far = max(best_cheaper, best), gain, cost
        on_front[i] = gain == best and gain > best_cheaper
    return tuple(on_front)
