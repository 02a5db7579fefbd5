"""Bandwidth between ranks, measured on the process group that training will use.

An all-reduce over all ranks gives the speed of the slowest part of the network.  A ring, in which
the first rank of each node sends to the next node's, gives the speed of each node.  The first round
pays for setting up connections, so the fastest of ROUNDS counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from lpl_pretrain.runtime.dist import barrier

ROUNDS = 3
MIB = {"cuda": 64, "cpu": 4}
"""Size of the tensor that is sent."""


def all_reduce_mib_per_s(device: torch.device) -> float:
    """Collective.  MiB that a rank sends per second, 2 (n - 1) / n of the tensor in each round."""
    ranks = dist.get_world_size()
    mib = MIB[device.type]
    data = torch.ones(mib << 18, device=device)
    return 2 * (ranks - 1) / ranks * mib / fastest_s(lambda: dist.all_reduce(data), device)


def ring_mib_per_s(leaders: Sequence[int], device: torch.device) -> float | None:
    """Collective.  MiB per second that this rank receives from the leader before it.

    `leaders`: the first rank of each node.  None on other ranks, and where there is one leader.
    """
    rank = dist.get_rank()
    mib = MIB[device.type]
    sent = torch.ones(mib << 18, device=device)
    received = torch.ones(mib << 18, device=device)
    index = leaders.index(rank) if rank in leaders and len(leaders) > 1 else None

    def exchange() -> None:
        if index is not None:
            next_leader = leaders[(index + 1) % len(leaders)]
            previous_leader = leaders[index - 1]
            operations = [
                dist.P2POp(dist.isend, sent, next_leader),
                dist.P2POp(dist.irecv, received, previous_leader),
            ]
            for work in dist.batch_isend_irecv(operations):
                work.wait()

    seconds = fastest_s(exchange, device)
    return None if index is None else mib / seconds


def fastest_s(transfer: Callable[[], object], device: torch.device) -> float:
    """Collective.  Seconds of the fastest of ROUNDS, each of which all ranks begin together."""
    seconds = []
    for _ in range(ROUNDS):
        barrier()
        began_s = time.perf_counter()
        transfer()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began_s)
    return min(seconds)
