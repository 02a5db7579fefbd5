"""Means over everything since the last line, by weight; a mean over nothing is absent."""

import math

import torch

from lpl_pretrain.runtime.preempt import StopRequest
from lpl_pretrain.runtime.timer import DeviceTimer
from lpl_pretrain.trainer.loop import Clock
from lpl_pretrain.trainer.metrics import Meter


def test_weighted_means():
    meter = Meter(torch.device("cpu"))
    meter.add("a", torch.tensor([1.0, 3.0]))
    meter.add("a", torch.tensor(5.0))
    meter.add("b", torch.tensor([2.0, math.nan]), torch.tensor([True, False]))
    meter.add("c", torch.tensor([1.0]), torch.tensor([False]))
    assert meter.flush() == {"a": 3.0, "b": 2.0}
    assert meter.flush() == {}


def test_clock_counts_updates():
    timer = DeviceTimer(torch.device("cpu"))
    clock = Clock(64, {"lpl": timer, "idle": DeviceTimer(torch.device("cpu"))})
    with timer:
        pass
    for _ in range(3):
        with clock.phase("data"):
            pass
        with clock.phase("update"):
            pass
    values = clock.flush()
    assert set(values) == {"samples_per_s", "seconds/data", "seconds/update", "seconds/lpl"} and values["samples_per_s"] > 0


def test_a_signal_only_sets_a_flag():
    import signal

    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR2)]
    try:
        stop = StopRequest().listen()
        assert not stop
        signal.raise_signal(signal.SIGUSR2)
        assert stop and stop.signal_name == "SIGUSR2"
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGUSR2), before):
            signal.signal(number, handler)
