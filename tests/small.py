"""The smallest run that still has every part: what the tests of mistakes and faults have in common."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

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


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, negative for a signal, and what it wrote to stderr."""

    status: int
    err: str


def run_child(target: Callable[..., None], *args: object, cwd: Path) -> Ended:
    """Call ``target``, which may kill itself, in a process of its own with one thread.

    The processes are forked from one server that has imported everything and computed nothing.
    """
    process = _start(target, args, cwd, cwd / "stderr", {})
    process.join(120)
    status = process.exitcode
    process.kill()
    process.join()
    assert status is not None, "the process did not end"
    return Ended(status, (cwd / "stderr").read_text())


def run_ranks(target: Callable[..., None], *args: object, ranks: int, cwd: Path, seconds: float = 120) -> list[Ended]:
    """Call ``target`` in so many processes with the environment that torchrun gives them; a stopped one is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        _start(target, args, cwd, cwd / f"stderr{rank}", {"RANK": rank, "LOCAL_RANK": rank, **common})
        for rank in range(ranks)
    ]
    end = time.monotonic() + seconds
    while any(p.is_alive() for p in processes) and time.monotonic() < end:
        time.sleep(0.05)
        if sum(p.is_alive() for p in processes) == 1:  # one that was stopped never ends
            end = min(end, time.monotonic() + 20)
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return [
        Ended(-signal.SIGKILL if status is None else status, (cwd / f"stderr{rank}").read_text())
        for rank, status in enumerate(statuses)
    ]


def _start(
    target: Callable[..., None], args: tuple[object, ...], cwd: Path, errors: Path, environment: dict[str, object]
) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bonn_plugin.train", "bonn_plugin.cli", "sklearn.datasets", "pytest"])
    variables = {name: str(value) for name, value in environment.items()}
    process = context.Process(target=_child, args=(target, args, cwd, errors, variables))
    process.start()
    return process


def _child(
    target: Callable[..., None], args: tuple[object, ...], cwd: Path, errors: Path, environment: dict[str, str]
) -> None:
    os.chdir(cwd)
    os.environ.update(environment)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    os.dup2(os.open(f"{errors}.out", flags), 1)
    os.dup2(os.open(errors, flags), 2)
    torch.set_num_threads(1)
    target(*args)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below ``folder`` by its path."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
