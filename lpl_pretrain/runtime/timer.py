"""How long the parts of a step take, without making the host wait for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch


class DeviceTimer:
    """`with timer:` around the part; `flush()` waits for the device, says the seconds since the
    last flush, and starts anew.
    """

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
        spans, self._spans = self._spans, []
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
    """Seconds by name since the last flush: `phase` is what the host spends, `part` what the device
    does.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._phases: dict[str, float] = {}
        self._parts: dict[str, DeviceTimer] = {}
        self._started = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        entered = time.perf_counter()
        yield
        self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - entered

    def part(self, name: str) -> DeviceTimer:
        if name not in self._parts:
            self._parts[name] = DeviceTimer(self.device)
        return self._parts[name]

    def flush(self) -> dict[str, float]:
        """Also `all`: the seconds since the last flush, whatever they were spent on.  What did not
        happen is absent.
        """
        parts = {name: seconds for name, timer in self._parts.items() if (seconds := timer.flush())}
        now = time.perf_counter()
        found = {"all": now - self._started, **self._phases, **parts}
        self._phases, self._started = {}, now
        return found
