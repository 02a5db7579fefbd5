"""Means over everything since the last line, by weight; a mean over nothing is absent."""

import math
import sys
import time

import torch

from lpl_pretrain.runtime.preempt import StopRequest
from lpl_pretrain.runtime.timer import Clock
from lpl_pretrain.trainer.metrics import Meter


def test_weighted_means():
    meter = Meter(torch.device("cpu"))
    meter.add("a", torch.tensor([1.0, 3.0]))
    meter.add("a", torch.tensor(5.0))
    meter.add("b", torch.tensor([2.0, math.nan]), torch.tensor([True, False]))
    meter.add("c", torch.tensor([1.0]), torch.tensor([False]))
    meter.end_update(applied=torch.tensor(True))
    assert meter.flush() == {"a": 3.0, "b": 2.0}
    assert meter.flush() == {}


def test_a_skipped_update_does_not_enter_the_means():
    meter = Meter(torch.device("cpu"))
    for value, applied in ((1.0, True), (math.nan, False), (3.0, True)):
        meter.add("a", torch.tensor(value))
        meter.end_update(applied=torch.tensor(applied))
    assert meter.flush() == {"a": 2.0}
    meter.add("a", torch.tensor(math.nan))
    meter.end_update(applied=torch.tensor(False))
    assert meter.flush() == {}


def test_a_clock_separates_host_phases_from_device_parts():
    clock = Clock(torch.device("cpu"))
    with clock.host("data"):
        pass
    for _ in range(2):
        with clock.host("update"), clock.device("forward"):
            time.sleep(0.01)
    clock.device("never")
    seconds = clock.flush()
    assert set(seconds) == {"all", "data", "update", "forward"}
    assert 0.02 <= seconds["forward"] <= seconds["update"] <= seconds["all"]
    assert set(clock.flush()) == {"all"}


def test_a_signal_only_sets_a_flag():
    import signal

    numbers = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
    before, hook = [signal.getsignal(s) for s in numbers], sys.unraisablehook
    try:
        stop = StopRequest().listen()
        assert not stop
        signal.raise_signal(signal.SIGUSR2)
        assert stop and stop.signal_name == "SIGUSR2"
    finally:
        signal.set_wakeup_fd(-1)
        sys.unraisablehook = hook
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
