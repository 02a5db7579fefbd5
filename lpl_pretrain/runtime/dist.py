"""Start and end of the process group, and the collectives that the other packages use.

The backend is gloo on CPU, nccl on CUDA.  Without a process group (one process, strategy local)
every collective returns its input, so callers need not distinguish.  Objects are sent as JSON:
nothing is pickled.
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

HOSTNAME_BYTES = 64
"""Longest hostname on Linux."""


def rendezvous_store(world: World) -> dist.Store:
    """Collective.  Returns the store with which ranks exchange messages before `init`."""
    if world.world_size == 1:
        return dist.HashStore()
    store, _, _ = next(rendezvous("env://", world.rank, world.world_size))
    return store


def init(
    world: World,
    *,
    group: bool = False,
    store: dist.Store | None = None,
    timeout: timedelta | None = None,
) -> torch.device:
    """Collective.  Selects this rank's device and joins the process group.

    `group` makes a process group with one process too: DDP, FSDP2 and ZeRO need one.  Ranks find
    each other through `store`, or else through torchrun's environment variables.  `timeout` is how
    long a rank waits in a collective before it fails; by default the backend's 10 or 30 minutes.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        keep_freed_memory()
    if world.world_size > 1 or group:
        if store is None and world.world_size == 1:
            store = dist.HashStore()
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, timeout=timeout, rank=world.rank, world_size=world.world_size, store=store
        )
    return device


def shutdown() -> None:
    """Collective.  Waits for all ranks, then leaves the process group.

    Call it after success only: the wait would never end for a rank that failed.
    """
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def exit(status: int = 0) -> NoReturn:
    """Collective.  Shuts down, then ends the process without running destructors.

    Commands that torchrun starts end with it: of ranks that exited normally, one in twelve died of
    SIGABRT in gloo's threads after all work was done.
    """
    shutdown()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def barrier() -> None:
    """Collective.  Returns when every rank has called it."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1, device=_device()))
        if _device().type == "cuda":
            torch.cuda.synchronize()


def sum_over_ranks(value: Tensor) -> Tensor:
    """Collective.  Returns the elementwise sum in a new tensor; shapes agree on all ranks."""
    total = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def mean_over_ranks(value: Tensor) -> Tensor:
    """Collective.  Returns the elementwise mean in a new tensor; shapes agree on all ranks."""
    return sum_over_ranks(value) / (dist.get_world_size() if dist.is_initialized() else 1)


def all_gather_rows(row: Tensor) -> Tensor:
    """Collective.  Returns (ranks, n) on the CPU: the `row` (n,) of every rank.

    Length and dtype of the rows agree on all ranks.
    """
    if not dist.is_initialized():
        return row[None].cpu()
    rows = torch.zeros(dist.get_world_size(), len(row), dtype=row.dtype, device=_device())
    rows[dist.get_rank()] = row
    return sum_over_ranks(rows).cpu()


def all_gather_hostnames() -> list[str]:
    """Collective.  Returns the hostname of each rank."""
    name = socket.gethostname().encode()[:HOSTNAME_BYTES].ljust(HOSTNAME_BYTES, b"\0")
    rows = all_gather_rows(torch.tensor(list(name), dtype=torch.int32))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows.tolist()]


def any_over_ranks(*values: bool) -> list[bool]:
    """Collective.  Returns each value's logical OR over ranks."""
    if not dist.is_initialized():
        return list(values)
    flags = torch.tensor(values, dtype=torch.int32, device=_device())
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


class AgreedFlags:
    """Flags that become True on all ranks once one rank has raised them, one step later, so that no
    rank waits for another: `post` starts the reduction, the next `read` fetches it.

    The reduction runs on the host (gloo), beside the device's work.
    """

    def __init__(self, count: int) -> None:
        """Collective."""
        self._agreed = torch.zeros(count, dtype=torch.int32)
        self._pending: dist.Work | None = None
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized() and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")  # type: ignore[assignment]

    def post(self, *values: bool) -> None:
        """Collective, without waiting."""
        if dist.is_initialized():
            self._agreed = torch.tensor(values, dtype=torch.int32)
            self._pending = dist.all_reduce(
                self._agreed, op=dist.ReduceOp.MAX, group=self._group, async_op=True
            )

    def read(self, *values: bool) -> list[bool]:
        """Flags of the last `post`, the same on all ranks; of one process: its present `values`."""
        if not dist.is_initialized():
            return list(values)
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        return [bool(flag) for flag in self._agreed.tolist()]


def first_error(message: str | None) -> str | None:
    """Collective.  Returns, on all ranks, the message of the lowest rank that has one, or None.

    All ranks can then raise the same error, or none does.
    """
    if not dist.is_initialized():
        return message
    world_size = dist.get_world_size()
    source = torch.tensor([world_size if message is None else dist.get_rank()], device=_device())
    dist.all_reduce(source, op=dist.ReduceOp.MIN)
    if int(source) == world_size:
        return None
    return broadcast_json(message, source=int(source))


def broadcast_json(value: Any, *, source: int = 0) -> Any:
    """Collective.  Returns the value of rank `source` on all ranks.

    The value passes through JSON on rank `source` too, so tuples become lists everywhere.
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
    """Device of the tensors that the backend communicates."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
