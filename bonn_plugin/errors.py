"""The errors that a user's mistake raises: one line each, with the place and the remedy.

The command prints them and exits with status 2; a library user catches ``BonnError``.
"""

from __future__ import annotations

from collections.abc import Sequence


class BonnError(Exception):
    """A mistake in what was asked for, told in one line."""


def one_line(error: BaseException) -> str:
    """Return another library's message as one line that is not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


class ModelError(BonnError):
    """A recipe and a model do not fit: a selector that matches nothing, a module that can't be binarised.

    Attributes:
        path: where in the modifier's settings the mistake lies, such as ``("targets", 0)``.
    """

    def __init__(self, message: str, path: Sequence[str | int] = ()) -> None:
        super().__init__(message)
        self.path = tuple(path)


class SessionError(BonnError):
    """A session used in the wrong order."""


class DataError(BonnError):
    """A data set that is missing or not what it should be."""


class CheckpointError(BonnError):
    """A checkpoint that is damaged, incomplete, or of another kind."""


class TrainingError(BonnError):
    """A training run that cannot go on."""


class Followed(BonnError):
    """A mistake that all processes of a run met together, which process 0 tells."""


class ExportError(BonnError):
    """A network that an engine can't express, an engine that is missing, or an export that is damaged or wrong."""
