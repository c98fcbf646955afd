"""The processes that train one network together, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from bonn_plugin.collective import most_over_ranks
from bonn_plugin.errors import BonnError, Followed, TrainingError, one_line
from bonn_plugin.train.watch import Watch

RANK_TIMEOUT = 600.0
"""Seconds after which a process that the others wait for counts as hanging."""


@dataclass
class World:
    """One process's view of all that train together; one process alone is a world of its own.

    Attributes:
        rank: this process, from 0.
        ranks: processes.
        local_rank: this process among those of its machine.
        watch: who looks after the others; None where there are none.
    """

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    watch: Watch | None = None

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def mark(self, where: str) -> None:
        """Note for the others how far this process is."""
        if self.watch is not None:
            self.watch.mark(where)

    def most(self, values: Sequence[float]) -> list[float]:
        """Return the largest of each value over all processes."""
        return list(values) if self.ranks == 1 else most_over_ranks(torch.tensor(values, dtype=torch.float64)).tolist()

    def close(self) -> None:
        """Take leave of the others when all have come so far; then each is alone."""
        if self.ranks == 1:
            return
        assert self.watch is not None
        dist.barrier()
        self.watch.end("")
        dist.destroy_process_group()

    @contextmanager
    def naming_faults(self) -> Iterator[None]:
        """Turn the failure of a collective into one line that names the process which made it fail.

        Raises:
            TrainingError: another process died or stopped.
        """
        if self.watch is None:
            yield
            return
        try:
            yield
        except Followed:
            self.watch.end("as rank 0 says")
            raise
        except BonnError as error:
            self.watch.end(str(error))
            raise type(error)(f"rank {self.rank}: {error}" if not self.leads else str(error)) from error
        except RuntimeError as error:
            culprit = self.watch.culprit()
            self.watch.end(culprit or one_line(error))
            if culprit is None:  # a mistake of this process's own
                raise
            raise TrainingError(f"{culprit}; {self.watch.advice()}") from error


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """Return rank, processes and local rank that torchrun has set; 0, 1, 0 where this is one process alone.

    Raises:
        TrainingError: the variables are there but wrong.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        return 0, 1, 0
    try:
        rank, ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local = int(environment.get("LOCAL_RANK", environment["RANK"]))
        int(environment["MASTER_PORT"])
    except ValueError:
        raise TrainingError("RANK, WORLD_SIZE, LOCAL_RANK and MASTER_PORT must be numbers: start by torchrun") from None
    if not 0 <= rank < ranks:
        raise TrainingError(f"RANK {rank} is not below WORLD_SIZE {ranks}: start by torchrun")
    return rank, ranks, local


def open_world(device: torch.device, timeout: float = RANK_TIMEOUT) -> World:
    """Join the processes that torchrun started, by gloo and on a GPU by NCCL too.

    Args:
        device: where this process trains.
        timeout: seconds after which a process that dies or hangs is named and the others end.

    Raises:
        TrainingError: the others can't be reached.
    """
    rank, ranks, local = launched()
    if ranks == 1:
        return World()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=timeout)
    try:
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        root = dist.TCPStore(  # type: ignore[attr-defined]  # torch exports it on some platforms alone
            host, port, ranks, is_master=rank == 0 and not served, timeout=limit
        )
        store = PrefixStore(f"bonn/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", root)
        return join_world(store, rank, ranks, local, device, timeout)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"rank {rank} can't reach the others at {host}:{port}: {one_line(error)}") from error


def join_world(
    store: Store,
    rank: int,
    ranks: int,
    local: int,
    device: torch.device,
    timeout: float = RANK_TIMEOUT,
) -> World:
    """Like ``open_world``, over a store that is open already."""
    watch = Watch(store, rank, ranks, timeout)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # longer than the watch waits, which knows who is at fault
    limit = timedelta(seconds=2 * timeout + 60)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=limit)
    watch.start()
    return World(rank, ranks, local, watch)
