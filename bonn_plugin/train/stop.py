"""SIGTERM, as a scheduler sends it before it takes the machine away: the run saves its state and ends well."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):
    """The run was asked to stop; its state is on the disk."""


class StopRequest:
    """Whether SIGTERM has come.

    Attributes:
        asked: it has.
    """

    def __init__(self) -> None:
        self.asked = False
        self._process = os.getpid()
        self._urgent = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM as a request while the context is open."""
        before = signal.signal(signal.SIGTERM, self._take)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def urgent(self) -> Iterator[None]:
        """Raise ``Stopped`` at once while the context is open: nothing is lost by it there."""
        self._urgent = True
        try:
            if self.asked:
                raise Stopped
            yield
        finally:
            self._urgent = False

    def _take(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loader's process: it ends when this one does
        self.asked = True
        if self._urgent:
            raise Stopped
