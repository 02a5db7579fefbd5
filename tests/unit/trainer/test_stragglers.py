"""Detection of slow ranks from the time each rank spends by itself: a single slow measurement or a
short wait is no straggler, and a rank is not reported twice in a row.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer import stragglers
from lpl_pretrain.trainer.stragglers import Probe, Stragglers, run_delay, times_the_median

CPU, RANKS = torch.device("cpu"), 3


class Events(list):
    def event(self, name, step, **details):
        self.append({"event": name, "step": step, **details})


@pytest.fixture
def rank_0(monkeypatch):
    """The straggler detection of rank 0 of three; ranks 1 and 2 never wait, and the times of the
    probe and of the core are constant.
    """

    def rows(row):
        return torch.stack(
            [
                row,
                *[row if row.dtype == torch.uint8 else torch.tensor([0.0, 0.0, 1.0])] * (RANKS - 1),
            ]
        )

    monkeypatch.setattr(stragglers, "all_gather_rows", rows)
    monkeypatch.setattr(stragglers, "MEASURE_EVERY_S", 0.0)
    monkeypatch.setattr(stragglers, "run_delay", lambda: 0.0)
    monkeypatch.setattr(Probe, "seconds", lambda self: 1.0)
    monkeypatch.setattr("socket.gethostname", lambda: "node1.site")
    return Stragglers(World(0, 0, RANKS), CPU, torch.float32, Events())


def waits(stragglers, *data_s):
    """Steps at which rank 0 is reported as slow, where updates take one second and wait `data_s[i]`
    seconds for data at log step i + 1.
    """
    stragglers.trackers.clear()
    for step, seconds in enumerate(data_s, start=1):
        stragglers.update(step, {"all": 10.0, "data": 10 * seconds}, 10)
    return [event["step"] for event in stragglers.trackers]


def test_times_the_median():
    rows = torch.tensor([[0.1, 0.0, 2.0], [0.9, 0.2, 1.0], [0.3, 0.0, 1.0]], dtype=torch.float64)
    wanted = torch.tensor([[1 / 3, 1, 2], [3, 4, 1], [1, 1, 1]], dtype=torch.float64)
    torch.testing.assert_close(times_the_median(rows, update_s=1.0), wanted)
    assert times_the_median(rows[:2], update_s=1.0)[:, 0].tolist() == pytest.approx([1, 9]), (
        "of two ranks the fast one is usual"
    )


@pytest.mark.parametrize(("update_s", "slow"), [(1.0, False), (0.01, True)])
def test_waits_that_are_short_for_an_update_do_not_matter(update_s, slow):
    rows = torch.tensor(
        [[0.001, 0.0, 1.0], [0.02, 0.0, 1.0], [0.001, 0.0, 1.0]], dtype=torch.float64
    )
    assert bool((times_the_median(rows, update_s) > stragglers.SLOW_FACTOR).any()) is slow


def test_a_rank_that_stays_slow_is_reported_but_not_at_every_log_step(rank_0, monkeypatch):
    assert waits(rank_0, *[0.5] * 6) == [3]
    assert rank_0.trackers == [
        {
            "event": "straggler",
            "step": 3,
            "rank": 0,
            "host": "node1.site",
            "measure": "data",
            "times": 10.0,
        }
    ]
    metrics = rank_0.update(7, {"all": 10.0, "data": 5.0}, 10)
    assert metrics["ranks/data_spread"] == pytest.approx(10) and metrics["ranks/data_slowest"] == 0
    assert metrics["ranks/core_spread"] == metrics["ranks/device_spread"] == 1
    monkeypatch.setattr(stragglers, "WARN_EVERY_S", 0.0)
    assert waits(rank_0, 0.5, 0.5) == [1, 2]


def test_single_slow_measurements_are_not_reported(rank_0):
    assert waits(rank_0, 0, 0, 9.0, 0, 9.0, 0, 0, 0, 9.0) == []
    assert waits(rank_0, 9.0, 9.0) == [2], "three of the last five"


@pytest.mark.parametrize(("every_s", "warned"), [(0.2, []), (0.0, [3])])
def test_calls_within_measure_every_s_are_one_measurement(rank_0, monkeypatch, every_s, warned):
    monkeypatch.setattr(stragglers, "MEASURE_EVERY_S", every_s)
    assert waits(rank_0, 9.0, 9.0, 9.0) == warned
    monkeypatch.setattr(stragglers, "MEASURE_EVERY_S", 0.0)
    waits(rank_0, 1.0)
    assert rank_0._waits[0][0] == (9.0 if warned else 7.0), "nothing is forgotten"


def test_a_single_rank_has_no_metrics():
    assert Stragglers(World(), CPU, torch.float32, Events()).update(9, {"all": 1.0}, 1) == {}


@pytest.mark.parametrize(("fraction", "measurements"), [(0.1, range(4, 9)), (1e9, range(9, 99))])
def test_the_probe_keeps_to_its_fraction_of_the_time(monkeypatch, fraction, measurements):
    """A update takes 50 ms: a tenth of 2 s is 4 of them, beside the first ones."""
    monkeypatch.setattr(stragglers, "PROBE_FRACTION", fraction)
    probe = Probe(CPU, torch.float32)
    runs = []
    monkeypatch.setattr(
        Probe, "_probe_once", lambda self: (time.sleep(0.01), runs.append(1), 0.01)[-1]
    )
    end = time.monotonic() + 2
    while time.monotonic() < end:
        assert probe.seconds() == 0.01
        time.sleep(0.001)
    assert len(runs) / stragglers.PROBE_REPEATS in measurements


def test_an_interrupted_probe_does_not_count_and_a_slow_device_does(monkeypatch):
    probe = Probe(CPU, torch.float32)
    usual = iter([0.5, 0.01, 0.5, 0.5, 0.011] * stragglers.MIN_MEASUREMENTS)
    monkeypatch.setattr(Probe, "_probe_once", lambda self: next(usual))
    assert [probe.seconds() for _ in range(stragglers.MIN_MEASUREMENTS)][-1] == 0.01
    monkeypatch.undo()
    quick, slow = Probe(CPU, torch.float32), Probe(CPU, torch.float32)
    slow.products *= 8
    assert slow.seconds() > 3 * quick.seconds()


@pytest.mark.skipif(
    not os.path.exists("/proc/self/schedstat"), reason="this kernel does not count run delays"
)
def test_waiting_for_a_core_is_not_sleeping():
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # the child inherits it
    rival = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    )
    try:
        rival.stdout.readline()
        before, began = run_delay(), time.monotonic()
        while time.monotonic() < began + 1:
            pass
        waited = run_delay() - before
    finally:
        rival.kill()
        rival.wait()
        os.sched_setaffinity(0, cores)
    before = run_delay()
    time.sleep(1)
    assert waited > 0.25 > run_delay() - before
