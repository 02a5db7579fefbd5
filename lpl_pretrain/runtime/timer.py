"""How long a part of a step takes on the device, without making the host wait for it."""

from __future__ import annotations

import time
from types import TracebackType

import torch


class DeviceTimer:
    """`with timer:` around the part; `flush()` waits for the device, says the seconds since the last flush, and starts anew."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple] = []

    def __enter__(self) -> None:
        self._spans.append((self._mark(),))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
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
