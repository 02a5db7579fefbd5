"""Starting and ending the process group, and the few collectives that rooms above `parallel` use.

gloo on CPU, nccl on CUDA.  Without a group (one process, strategy local) every collective is the
identity, so callers never ask. Objects travel as JSON: nothing is pickled.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from lpl_pretrain.runtime.device import keep_freed_memory
from lpl_pretrain.runtime.world import World

HOST_BYTES = 64
"""The longest name of a machine on Linux."""


def meet(world: World) -> dist.Store:
    """Communicates when there is more than one rank: where ranks leave word for each other before
    there is a group.
    """
    return (
        dist.HashStore()
        if world.world_size == 1
        else next(rendezvous("env://", world.rank, world.world_size))[0]
    )


def start(
    world: World,
    *,
    group: bool = False,
    store: dist.Store | None = None,
    patience: timedelta | None = None,
) -> torch.device:
    """Communicates when there is more than one rank: picks this rank's device and joins the process
    group.

    `group` asks for a group on one process too: DDP, FSDP2 and ZeRO need one.  Ranks meet at
    `store`, or where torchrun says. `patience`: how long a rank may wait for another before the run
    counts as hung; absent: the backend's 10 or 30 minutes.
    """
    device = (
        torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if world.world_size > 1 or group:
        if store is None and world.world_size == 1:
            store = dist.HashStore()
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, timeout=patience, rank=world.rank, world_size=world.world_size, store=store
        )
    return device


def stop() -> None:
    """Communicates: waits for all ranks, then leaves the group.  Call it after success only: a
    failed rank never arrives.
    """
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def leave(status: int = 0) -> NoReturn:
    """Communicates, then ends the process without running destructors: the last line of a command
    started by torchrun.

    Of ranks that exit normally after all work is done, one in a dozen dies of SIGABRT (gloo's
    threads); none that left so did.
    """
    stop()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def barrier() -> None:
    """Communicates: returns when every rank has called it."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1, device=_device()))
        if _device().type == "cuda":
            torch.cuda.synchronize()


def sum_over_ranks(value: Tensor) -> Tensor:
    """Communicates: the elementwise sum, a new tensor; `value` has the same shape on all ranks."""
    total = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def mean_over_ranks(value: Tensor) -> Tensor:
    """Communicates: the elementwise mean, a new tensor; `value` has the same shape on all ranks."""
    return sum_over_ranks(value) / (dist.get_world_size() if dist.is_initialized() else 1)


def rows_over_ranks(row: Tensor) -> Tensor:
    """Communicates: (ranks, n) on the CPU, the `row` (n,) of every rank; all have one length and
    type.
    """
    if not dist.is_initialized():
        return row[None].cpu()
    rows = torch.zeros(dist.get_world_size(), len(row), dtype=row.dtype, device=_device())
    rows[dist.get_rank()] = row
    return sum_over_ranks(rows).cpu()


def hosts_of_ranks() -> list[str]:
    """Communicates: the name of each rank's machine."""
    name = socket.gethostname().encode()[:HOST_BYTES]
    rows = rows_over_ranks(torch.tensor(list(name.ljust(HOST_BYTES, b"\0")), dtype=torch.int32))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows.tolist()]


def any_over_ranks(*values: bool) -> list[bool]:
    """Communicates: each True on all ranks when it is on one."""
    if not dist.is_initialized():
        return list(values)
    flags = torch.tensor(values, dtype=torch.int32, device=_device())
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def first_over_ranks(message: str | None) -> str | None:
    """Communicates: the message of the lowest rank that has one, on all ranks; so that all raise
    the same error, or none does.
    """
    if not dist.is_initialized():
        return message
    source = torch.tensor(
        [dist.get_world_size() if message is None else dist.get_rank()], device=_device()
    )
    dist.all_reduce(source, op=dist.ReduceOp.MIN)
    return (
        None
        if int(source) == dist.get_world_size()
        else broadcast_json(message, source=int(source))
    )


def broadcast_json(value: Any, *, source: int = 0) -> Any:
    """Communicates: the value of rank `source` on all ranks, after a round through JSON (so tuples
    are lists everywhere).
    """
    if not dist.is_initialized():
        return json.loads(json.dumps(value))
    text = json.dumps(value).encode() if dist.get_rank() == source else b""
    size = torch.tensor([len(text)], device=_device())
    dist.broadcast(size, src=source)
    data = torch.frombuffer(bytearray(text.ljust(int(size))), dtype=torch.uint8).to(_device())
    dist.broadcast(data, src=source)
    return json.loads(bytes(data.tolist()))


def _device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if dist.get_backend() == "nccl"
        else torch.device("cpu")
    )
