"""Timers for the parts of a step that do not make the host wait for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch


class DeviceTimer:
    """Measures what runs inside `with timer:` on the device (CUDA events), or on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple] = []

    def __enter__(self) -> None:
        self._spans.append((self._mark(),))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._spans[-1] += (self._mark(),)

    def flush(self) -> float:
        """Waits for the device; returns the seconds since the last flush and resets the timer."""
        spans = self._spans
        self._spans = []
        if self._cuda and spans:
            torch.cuda.synchronize()
            return sum(start.elapsed_time(end) for start, end in spans) / 1000
        return sum(end - start for start, end in spans)

    def _mark(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Clock:
    """Sums seconds by name: `host` measures time on the host, `device` time on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host_seconds: dict[str, float] = {}
        self._device_timers: dict[str, DeviceTimer] = {}
        self._last_flush = time.perf_counter()

    @contextmanager
    def host(self, name: str) -> Iterator[None]:
        entered = time.perf_counter()
        yield
        elapsed = time.perf_counter() - entered
        self._host_seconds[name] = self._host_seconds.get(name, 0.0) + elapsed

    def device(self, name: str) -> DeviceTimer:
        if name not in self._device_timers:
            self._device_timers[name] = DeviceTimer(self._device)
        return self._device_timers[name]

    def flush(self) -> dict[str, float]:
        """Returns seconds by name since the last flush, and the total under `all`; resets them.

        Waits for the device.  A name that was not measured is absent.
        """
        device_seconds = {name: timer.flush() for name, timer in self._device_timers.items()}
        measured = {name: seconds for name, seconds in device_seconds.items() if seconds}
        now = time.perf_counter()
        result = {"all": now - self._last_flush, **self._host_seconds, **measured}
        self._host_seconds = {}
        self._last_flush = now
        return result
