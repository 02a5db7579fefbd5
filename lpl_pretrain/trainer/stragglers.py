"""Which rank the others wait for.

Steps of synchronous training take all ranks equally long, for each waits for the slowest; so a rank
tells what it spends by itself:

    data     seconds of an update that it waited for its next batch
    core     seconds of an update that its main thread was ready to run and had no core (Linux's run delay)
    device   seconds of a fixed piece of arithmetic, in the training's number format, while the device has nothing else to do

Each is the median of the last WINDOW looks, compared with the median over ranks (of two in the
middle, the lower).  What none of them shows is the network: there all wait for each other.

It costs one reduction of three numbers a rank at each log step, and PROBE_SHARE of the time for the
arithmetic.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from lpl_pretrain.runtime.dist import all_gather_rows
from lpl_pretrain.runtime.log import log
from lpl_pretrain.runtime.timer import DeviceTimer
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trackers.build import Trackers

MEASURES = {
    "data": "waiting for data",
    "core": "waiting for a core",
    "device": "the same arithmetic",
}
WINDOW, AT_FIRST, LOOK_S = 5, 3, 10.0
"""Looks of which the median counts, those before anybody is called slow, and the least that lies
between two: one bad moment makes no straggler, and processes that share cores are late in turn.
"""
SLOW = 1.5
"""Times the median from which on a rank is called slow."""
SMALL = 0.05
"""Waits shorter than this share of an update count as this long."""
REMIND_S = 600.0
"""Between two warnings about one rank."""
GOES, PROBE_SHARE = 5, 0.002
NAME_BYTES = 64


class Stragglers:
    """Collective: every rank makes one and asks it at every log step; rank 0 tells.  One rank has
    nobody to compare with.
    """

    def __init__(
        self, world: World, device: torch.device, dtype: torch.dtype, trackers: Trackers
    ) -> None:
        self.world, self.trackers = world, trackers
        if world.world_size > 1:
            name = socket.gethostname().encode()[:NAME_BYTES].ljust(NAME_BYTES)
            names = all_gather_rows(torch.frombuffer(bytearray(name), dtype=torch.uint8))
            self.hosts = [bytes(row).decode(errors="replace").strip() for row in names.tolist()]
            self.probe, self._delay = Probe(device, dtype), run_delay()
            self._waits: deque[tuple[float, float]] = deque(maxlen=WINDOW)
            self._data_s, self._updates, self._looked = 0.0, 0, time.monotonic()
            self._told: dict[int, float] = {}

    def look(self, step: int, seconds: dict[str, float], updates: int) -> dict[str, float]:
        """Collective, and the device is idle.  What to log, on rank 0; `seconds`: a clock's, over
        the last `updates`.
        """
        if self.world.world_size == 1:
            return {}
        self._data_s += seconds.get("data", 0.0)
        self._updates += updates
        if (now := time.monotonic()) - self._looked >= LOOK_S:
            delay = run_delay()
            self._waits.append(
                (self._data_s / self._updates, (delay - self._delay) / self._updates)
            )
            self._data_s, self._updates, self._delay, self._looked = 0.0, 0, delay, now
        row = [*map(median, zip(*(self._waits or [(0.0, 0.0)]), strict=True)), self.probe.seconds()]
        rows = all_gather_rows(torch.tensor(row, dtype=torch.float64))
        if self.world.rank:
            return {}
        times = times_the_median(rows, seconds["all"] / updates)
        if len(self._waits) >= AT_FIRST:
            self._call(step, times)
        slowest = times.max(dim=0)
        found: dict[str, float] = {}
        for i, name in enumerate(MEASURES):
            found |= {
                f"ranks/{name}_spread": slowest.values[i].item(),
                f"ranks/{name}_slowest": slowest.indices[i].item(),
            }
        return found

    def _call(self, step: int, times: Tensor) -> None:
        """Each slow rank by its worst measure, unless that was done in the last REMIND_S."""
        now = time.monotonic()
        for rank, row in enumerate(times.tolist()):
            worst, measure = max(zip(row, MEASURES, strict=True))
            if worst > SLOW and now - self._told.get(rank, -REMIND_S) >= REMIND_S:
                self._told[rank], host = now, self.hosts[rank]
                what = MEASURES[measure]
                log.warning(
                    "rank %d on %s is slow: it spends %.1f times the median of all ranks on %s",
                    rank,
                    host,
                    worst,
                    what,
                )
                self.trackers.event(
                    "straggler", step, rank=rank, host=host, measure=measure, times=round(worst, 2)
                )


def times_the_median(rows: Tensor, update_s: float) -> Tensor:
    """(ranks, measures) of seconds: each over the median of its column; waits below SMALL of an
    update count as that much.
    """
    small = SMALL * update_s
    rows = rows.clamp(min=torch.tensor([small, small, 1e-9], dtype=rows.dtype))
    return rows / rows.median(dim=0).values


class Probe:
    """A fixed piece of arithmetic: GOES products of matrices on a CPU, about 2 ms; larger ones, and
    20 times as many, on a GPU.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        side, self.products = (2048, 20) if device.type == "cuda" else (256, 1)
        self.factor = (
            torch.linspace(-1, 1, side * side, device=device).reshape(side, side).to(dtype)
        )
        self.product = self.factor @ self.factor  # the first one is slow; memory is taken once
        self.timer, self._due = DeviceTimer(device), 0.0
        self._fastest: deque[float] = deque(maxlen=WINDOW)

    def seconds(self) -> float:
        """Of the fastest of GOES, because a go may be interrupted; the median of the last WINDOW
        times that this was done.
        """
        if len(self._fastest) < AT_FIRST or time.monotonic() >= self._due:
            goes = [self._go() for _ in range(GOES)]
            self._fastest.append(min(goes))
            self._due = time.monotonic() + sum(goes) / PROBE_SHARE
        return median(self._fastest)

    def _go(self) -> float:
        with self.timer:
            for _ in range(self.products):
                torch.mm(self.factor, self.factor, out=self.product)
        return self.timer.flush()


def run_delay() -> float:
    """Seconds that this process's main thread was ready to run and had no core, since it began; 0
    where nobody counts them.
    """
    file = Path("/proc/self/schedstat")
    return int(file.read_text().split()[1]) / 1e9 if file.is_file() else 0.0
