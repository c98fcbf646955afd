"""The smallest run that still has every part: what the tests of mistakes and faults have in common."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from bonn_plugin.cli import main

RECIPE = r"""version: 1
name: small
model: {name: bonn_wrn22_16, num_classes: 10, args: {widths: [8, 8, 8], depth: 10}}
data: {name: digits, size: 8}
training:
  epochs: 1
  batch_size: 256
  optimizer: {name: adam, lr: 1e-3}
  schedule: {name: constant}
modifiers:
  - {type: binarize, targets: ['re:layer[1-3]\.\d\.conv[12]'], expect: 6}
  - {type: kernel_loss, lambda: 1e-3, nu: 1e-2}
"""


@dataclass(frozen=True)
class Result:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The lines on stderr."""
        return self.err.splitlines()


def run_here(monkeypatch: pytest.MonkeyPatch, *args: str | Path) -> int:
    """Run the command in this process and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["bonn", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


class Command:
    """The command, run in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch = monkeypatch
        self.capsys = capsys

    def __call__(self, *args: str | Path) -> Result:
        self.capsys.readouterr()
        status = run_here(self.monkeypatch, *args)
        captured = self.capsys.readouterr()
        return Result(status, captured.out, captured.err)


def run_child(program: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ``program``, Python source that may kill itself, in a process of its own with one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below ``folder`` by its path."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
