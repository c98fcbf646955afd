"""Which process of a run died or hangs: each tells the others through the store that it lives and how far it is."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed.distributed_c10d import Store

BEAT_EVERY = 0.5
"""Seconds between two signs of life."""
SURELY_DEAD = 4.0
"""Seconds without one, after a collective failed, from which a process counts as dead."""
FAULT_STATUS = 1
HOLDERS = "torchrun, or rank 0 where it was started without"


@dataclass
class _Seen:
    """The last that was heard of a process, and since when it is so."""

    beat: str = ""
    beat_since: float = 0.0
    progress: int = -1
    progress_since: float = 0.0
    where: str = ""


class Watch(threading.Thread):
    """Beats for its own process and listens for the others'.

    A process is dead that gave no sign of life for ``timeout`` seconds, and hangs that stayed behind another for so
    long. Then this process says so and ends itself: its main thread waits in a collective that no one will answer.

    Args:
        store: that of the process group; a connection of its own is made.
        rank: of this process.
        ranks: processes.
        timeout: seconds.

    Attributes:
        advice: what to say after a fault: what is saved.
    """

    def __init__(self, store: Store, rank: int, ranks: int, timeout: float) -> None:
        super().__init__(name="watch", daemon=True)
        self.store = store.clone()
        self.store.set_timeout(timedelta(seconds=timeout))
        self.rank = rank
        self.ranks = ranks
        self.timeout = timeout
        self.advice: Callable[[], str] = lambda: "no state is saved"
        self._progress = 0
        self._where = "the start"
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._seen = [_Seen() for _ in range(ranks)]
        self._publish(0)

    def mark(self, where: str) -> None:
        """Note that this process came to ``where``; all processes mark the same places in the same order."""
        self._progress += 1
        self._where = where

    def end(self, message: str) -> None:
        """Tell the others that this process ends of itself: an error's line, or nothing where all is well."""
        self._over.set()
        with self._lock:
            self.store.set(f"end/{self.rank}", message or "done")

    def culprit(self) -> str | None:
        """After a collective failed: return what is known of the process that made it fail, None if nothing is."""
        give_up = time.monotonic() + 3 * SURELY_DEAD
        while time.monotonic() < give_up:
            try:
                self._listen()
            except RuntimeError:
                return f"who holds the store is gone: {HOLDERS}"
            for rank in self._others():
                ended = self._ended(rank)
                if ended not in (None, "done"):
                    return f"rank {rank} stopped: {ended}"
                if ended is None and time.monotonic() - self._seen[rank].beat_since > SURELY_DEAD:
                    return f"rank {rank} died, last heard of at {self._seen[rank].where}"
            time.sleep(BEAT_EVERY)
        return None

    def run(self) -> None:
        """Beat and listen until the end."""
        beat = 0
        while not self._over.wait(BEAT_EVERY):
            beat += 1
            try:
                self._publish(beat)
                self._listen()
                fault = self._fault()
            except Exception:
                if self._over.wait(2 * SURELY_DEAD):  # all is well, and who holds the store ended first
                    return
                print(f"rank {self.rank}: who holds the store is gone: {HOLDERS}", file=sys.stderr, flush=True)
                os._exit(FAULT_STATUS)
            if fault is not None and not self._over.is_set():
                culprit, what = fault
                if self.rank == min(r for r in range(self.ranks) if r != culprit) or self.rank == culprit:
                    print(f"{what}; {self.advice()}", file=sys.stderr, flush=True)
                os._exit(FAULT_STATUS)

    def _publish(self, beat: int) -> None:
        with self._lock:
            self.store.set(f"beat/{self.rank}", f"{beat}|{self._progress}|{self._where}")

    def _listen(self) -> None:
        with self._lock:
            values = self.store.multi_get([f"beat/{rank}" for rank in range(self.ranks)])
        now = time.monotonic()
        for seen, value in zip(self._seen, values, strict=True):
            beat, progress, seen.where = value.decode().split("|", 2)
            if beat != seen.beat:
                seen.beat, seen.beat_since = beat, now
            if int(progress) != seen.progress:
                seen.progress, seen.progress_since = int(progress), now

    def _fault(self) -> tuple[int, str] | None:
        now = time.monotonic()
        most = max(seen.progress for seen in self._seen)
        for rank, seen in enumerate(self._seen):
            if now - seen.beat_since > self.timeout and self._ended(rank) is None:
                return rank, f"rank {rank} gave no sign of life for {self.timeout:g} s, last heard of at {seen.where}"
        for rank, seen in enumerate(self._seen):
            behind = seen.progress < most and now - seen.progress_since > self.timeout
            if behind and self._ended(rank) is None:
                return rank, f"rank {rank} hangs: for {self.timeout:g} s it is at {seen.where}, and others wait for it"
        return None

    def _ended(self, rank: int) -> str | None:
        with self._lock:
            key = f"end/{rank}"
            return self.store.get(key).decode() if self.store.check([key]) else None

    def _others(self) -> list[int]:
        return [rank for rank in range(self.ranks) if rank != self.rank]
