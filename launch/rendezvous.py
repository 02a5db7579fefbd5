"""Rendezvous of a job's ranks: rank 0 publishes its node and a free port in the job folder."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path

from launch.slurm import node_name
from lpl_pretrain.runtime.atomic import atomic_write_json

TIMEOUT_S = 300.0
POLL_S = 0.2


def rendezvous_env(path: Path, rank: int, stopped: Callable[[], bool]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT, which rank 0 writes to `path` and the other ranks read there.

    The port is one that was free a moment ago.  Both values are void once `stopped()`.  Raises
    TimeoutError when rank 0 publishes nothing.
    """
    if rank == 0:
        atomic_write_json(path, {"address": node_name(), "port": free_port()}, indent=1)
    deadline = time.monotonic() + TIMEOUT_S
    while not path.is_file():
        if stopped():
            return {"MASTER_ADDR": "", "MASTER_PORT": "0"}
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{path}: rank 0 has not published its address in {TIMEOUT_S:.0f} s; does every "
                "node see this folder?"
            )
        time.sleep(POLL_S)
    published = json.loads(path.read_text())
    return {"MASTER_ADDR": published["address"], "MASTER_PORT": str(published["port"])}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
