"""Straggler detection: find the rank that the others wait for.

In synchronous training an update takes the same time on all ranks, because each waits for the
slowest.  Ranks are therefore compared by times that a rank does not spend waiting for others:

    data     seconds per update that the rank waited for its next batch
    core     seconds per update that its main thread was runnable without a core (Linux's run delay)
    device   seconds of a fixed matrix product in the training's dtype, on the idle device

Each is the median of the last WINDOW measurements, divided by the median over ranks (the lower one
for an even number of ranks).  A slow network is not detected: there all ranks wait for each other.

Costs: one all-gather of three numbers per rank at each log step, and at most PROBE_FRACTION of the
time for the matrix products.
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
WINDOW = 5
"""Measurements whose median counts, so that one bad moment makes no straggler."""
MIN_MEASUREMENTS = 3
"""Measurements before any rank is called slow."""
MEASURE_EVERY_S = 10.0
"""Least seconds between two measurements: processes that share cores are late in turn."""
SLOW_FACTOR = 1.5
"""A rank is slow if it spends more than this many times the median over ranks."""
SMALL_FRACTION = 0.05
"""Waits shorter than this fraction of an update count as this fraction."""
WARN_EVERY_S = 600.0
"""Least seconds between two warnings about one rank."""
PROBE_REPEATS = 5
"""Runs of the probe per measurement; the fastest counts."""
PROBE_FRACTION = 0.002
"""Largest fraction of the time that the probe takes."""
NAME_BYTES = 64


class Stragglers:
    """Compares ranks at every log step; rank 0 warns about slow ones.

    A run on one rank has no comparison and logs nothing.
    """

    def __init__(
        self, world: World, device: torch.device, dtype: torch.dtype, trackers: Trackers
    ) -> None:
        """Collective."""
        self.world = world
        self.trackers = trackers
        if world.world_size > 1:
            name = socket.gethostname().encode()[:NAME_BYTES].ljust(NAME_BYTES)
            names = all_gather_rows(torch.frombuffer(bytearray(name), dtype=torch.uint8))
            self.hosts = [bytes(row).decode(errors="replace").strip() for row in names.tolist()]
            self.probe = Probe(device, dtype)
            self._run_delay_s = run_delay()
            self._waits: deque[tuple[float, float]] = deque(maxlen=WINDOW)
            self._data_s = 0.0
            self._updates = 0
            self._measured_s = time.monotonic()
            self._warned_s: dict[int, float] = {}

    def update(self, step: int, seconds: dict[str, float], updates: int) -> dict[str, float]:
        """Collective. Metrics for the log on rank 0, empty elsewhere.  The device must be idle.

        `seconds`: by phase, from a `Clock`, over the last `updates` optimizer updates.
        """
        if self.world.world_size == 1:
            return {}
        self._data_s += seconds.get("data", 0.0)
        self._updates += updates
        if (now := time.monotonic()) - self._measured_s >= MEASURE_EVERY_S:
            delay = run_delay()
            self._waits.append(
                (self._data_s / self._updates, (delay - self._run_delay_s) / self._updates)
            )
            self._data_s = 0.0
            self._updates = 0
            self._run_delay_s = delay
            self._measured_s = now
        row = [*map(median, zip(*(self._waits or [(0.0, 0.0)]), strict=True)), self.probe.seconds()]
        rows = all_gather_rows(torch.tensor(row, dtype=torch.float64))
        if self.world.rank:
            return {}
        times = times_the_median(rows, seconds["all"] / updates)
        if len(self._waits) >= MIN_MEASUREMENTS:
            self._warn(step, times)
        slowest = times.max(dim=0)
        metrics: dict[str, float] = {}
        for i, name in enumerate(MEASURES):
            metrics |= {
                f"ranks/{name}_spread": slowest.values[i].item(),
                f"ranks/{name}_slowest": slowest.indices[i].item(),
            }
        return metrics

    def _warn(self, step: int, times: Tensor) -> None:
        """Warn about each slow rank, by its worst measure, at most once in WARN_EVERY_S."""
        now = time.monotonic()
        for rank, row in enumerate(times.tolist()):
            worst, measure = max(zip(row, MEASURES, strict=True))
            if (
                worst > SLOW_FACTOR
                and now - self._warned_s.get(rank, -WARN_EVERY_S) >= WARN_EVERY_S
            ):
                self._warned_s[rank] = now
                host = self.hosts[rank]
                log.warning(
                    "rank %d on %s is slow: it spends %.1f times the median of all ranks on %s",
                    rank,
                    host,
                    worst,
                    MEASURES[measure],
                )
                self.trackers.event(
                    "straggler", step, rank=rank, host=host, measure=measure, times=round(worst, 2)
                )


def times_the_median(rows: Tensor, update_s: float) -> Tensor:
    """Divide (ranks, measures) seconds by the median over ranks.

    Waits below SMALL_FRACTION of an update count as that much.
    """
    small = SMALL_FRACTION * update_s
    rows = rows.clamp(min=torch.tensor([small, small, 1e-9], dtype=rows.dtype))
    return rows / rows.median(dim=0).values


class Probe:
    """Times a fixed matrix product: one of side 256 on a CPU, 20 of side 2048 on a GPU."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        side, self.products = (2048, 20) if device.type == "cuda" else (256, 1)
        self.factor = (
            torch.linspace(-1, 1, side * side, device=device).reshape(side, side).to(dtype)
        )
        self.product = self.factor @ self.factor  # the first one is slow; memory is taken once
        self.timer = DeviceTimer(device)
        self._due_s = 0.0
        self._fastest: deque[float] = deque(maxlen=WINDOW)

    def seconds(self) -> float:
        """Median of the last WINDOW measurements; measures again when one is due.

        One measurement is the fastest of PROBE_REPEATS runs, because a run may be interrupted.
        """
        if len(self._fastest) < MIN_MEASUREMENTS or time.monotonic() >= self._due_s:
            durations = [self._probe_once() for _ in range(PROBE_REPEATS)]
            self._fastest.append(min(durations))
            self._due_s = time.monotonic() + sum(durations) / PROBE_FRACTION
        return median(self._fastest)

    def _probe_once(self) -> float:
        with self.timer:
            for _ in range(self.products):
                torch.mm(self.factor, self.factor, out=self.product)
        return self.timer.flush()


def run_delay() -> float:
    """Seconds since its start that this process's main thread was runnable without a core.

    0 where the kernel does not count them.
    """
    file = Path("/proc/self/schedstat")
    return int(file.read_text().split()[1]) / 1e9 if file.is_file() else 0.0
