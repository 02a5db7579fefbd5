"""How fast ranks reach each other, measured on the group that training will use.

All ranks reduce one tensor, which says how fast the slowest part of the network is; then each
node's first rank sends to the next node's, all at once in a ring, which says whose part that is.
The first round pays for connections: the best of a few counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from lpl_pretrain.runtime.dist import barrier

ROUNDS = 3
MIB = {"cuda": 64, "cpu": 4}


def all_reduce_mib_per_s(device: torch.device) -> float:
    """Communicates: bytes that a rank sends, by the time it takes (2 (n - 1) / n of the tensor)."""
    ranks, mib = dist.get_world_size(), MIB[device.type]
    data = torch.ones(mib << 18, device=device)
    return 2 * (ranks - 1) / ranks * mib / best_s(lambda: dist.all_reduce(data), device)


def ring_mib_per_s(leaders: Sequence[int], device: torch.device) -> float | None:
    """Communicates: into this rank, from the leader before it; None on ranks that are none, and
    where there is one only.
    """
    rank, mib = dist.get_rank(), MIB[device.type]
    place = leaders.index(rank) if rank in leaders and len(leaders) > 1 else None

    def pass_on() -> None:
        if place is not None:
            behind, before = leaders[(place + 1) % len(leaders)], leaders[place - 1]
            ways = [dist.P2POp(dist.isend, sent, behind), dist.P2POp(dist.irecv, received, before)]
            for work in dist.batch_isend_irecv(ways):
                work.wait()

    sent, received = (torch.ones(mib << 18, device=device) for _ in range(2))
    seconds = best_s(pass_on, device)
    return None if place is None else mib / seconds


def best_s(transfer: Callable[[], object], device: torch.device) -> float:
    """Communicates: of a few rounds that all ranks begin together."""
    found = []
    for _ in range(ROUNDS):
        barrier()
        began = time.perf_counter()
        transfer()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return min(found)
