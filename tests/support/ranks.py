"""Run a function on several forked gloo ranks and collect the return values.

Ranks are forked, not spawned, because a fork inherits the imports: a launch takes tenths of a
second instead of seconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lpl_pretrain.runtime.dist import init, shutdown
from lpl_pretrain.runtime.world import World

GRACE_S = 5.0


class RankFailed(AssertionError):
    """Failure of a rank; the message holds the tracebacks of all failed ranks."""


def run_ranks(
    world_size: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 120.0
) -> list[Any]:
    """Call `fn(world, device, *args)` on each rank; results in the order of ranks.

    A result may hold tensors, numbers, strings and containers of them.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = {
            _fork(folder, World(rank, rank, world_size), fn, args): rank
            for rank in range(world_size)
        }
        try:
            _wait(dict(ranks), folder, timeout_s)
        finally:
            for pid in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)
        return [
            torch.load(folder / f"result_{rank}", weights_only=True) for rank in range(world_size)
        ]


def _fork(folder: Path, world: World, fn: Callable[..., Any], args: tuple[Any, ...]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        world.to_environment()
        device = init(
            world, group=True, store=dist.FileStore(str(folder / "store"), world.world_size)
        )
        torch.save(fn(world, device, *args), folder / f"result_{world.rank}")
        shutdown()
        status = 0
    except BaseException:
        (folder / f"error_{world.rank}").write_text(traceback.format_exc())
    finally:
        os._exit(status)  # never back into pytest; and see runtime.dist.exit


def _wait(running: dict[int, int], folder: Path, timeout_s: float) -> None:
    """Wait until all ranks succeed; raise RankFailed GRACE_S after the first failure."""
    deadline = time.monotonic() + timeout_s
    failed = []
    while running:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                rank = running.pop(pid)
                if status:
                    failed.append((rank, status))
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if running and time.monotonic() > deadline:
            break
        time.sleep(0.01)
    if failed:
        errors = [path.read_text() for path in sorted(folder.glob("error_*"))]
        raise RankFailed(
            "\n".join(errors)
            or f"ranks ended with (rank, wait status) {failed} and left no traceback"
        )
    if running:
        raise RankFailed(f"ranks {sorted(running.values())} still ran after {timeout_s} s")
