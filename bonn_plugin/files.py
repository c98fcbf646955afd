"""Files that are whole or not there: written aside, flushed, renamed, and read again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from bonn_plugin.errors import CheckpointError


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write several files of one folder; none is replaced before all are on the disk.

    Args:
        folder: made if it is not there.
        contents: bytes by file name, renamed into place in this order.

    Raises:
        CheckpointError: the disk is full, the folder is not writable: what stood there before still stands. Or
            the file system lost what was written: each file is read again, in full.
    """
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            aside = folder / f".{name}.tmp"
            written.append(aside)
            with aside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name in contents:
            os.replace(folder / f".{name}.tmp", folder / name)
        _sync_folder(folder)
        changed = [name for name, content in contents.items() if not _holds(folder / name, content)]
    except OSError as error:
        for aside in written:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
        raise CheckpointError(
            f"can't write to {folder}: {error.strerror or error}; what was saved there before is untouched"
        ) from error
    if changed:
        raise CheckpointError(
            f"{folder / changed[0]} does not hold what was written a moment ago: its file system lost the rename "
            "or the content; choose another folder by --out"
        )


def write_file(path: Path, content: bytes) -> None:
    """Write one file; see ``write_files``."""
    write_files(path.parent, {path.name: content})


def sha256(content: bytes) -> str:
    """Return the SHA-256 of ``content`` in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # some systems can't open folders; the rename stands all the same
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
