"""The watchdog dumps stacks whatever a rank hangs in, and nothing while a rank is only slow, paused
or in its first steps.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import pytest

from lpl_pretrain.config.schema import WatchdogConfig
from lpl_pretrain.runtime.log import log
from lpl_pretrain.runtime.watchdog import MIN_TIMED_STEPS, Watchdog
from tests.support.commands import ROOT

HANG_S = 1.0
QUICK = WatchdogConfig(factor=4, at_least_s=0.4)
HANGS = {
    "asleep": lambda: time.sleep(HANG_S),
    "in a lock": lambda: (lock := threading.Lock()).acquire() and lock.acquire(timeout=HANG_S),
    "while holding the GIL": lambda: ctypes.PyDLL(None).usleep(int(1e6 * HANG_S)),
}


def steps(watchdog, count=MIN_TIMED_STEPS + 1, seconds=0.01):
    for _ in range(count):
        time.sleep(seconds)
        watchdog.step_done()


def hang_here(how):
    HANGS[how]()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "logs" / "stacks.txt"


@pytest.fixture
def watch(path):
    """Creates watchdogs that write to `path`; they end with the test."""
    yield lambda config=QUICK: Watchdog(config, path)
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.parametrize("how", HANGS)
def test_a_hang_leaves_the_stacks_of_all_threads(watch, path, how, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    watchdog = watch()
    end = threading.Event()
    another = threading.Thread(target=end.wait, name="another")
    another.start()
    steps(watchdog)
    hang_here(how)
    ended = time.time()
    end.set()
    stacks = path.read_text()
    assert (
        "in hang_here" in stacks
        and stacks.count("Thread 0x") >= 2
        and path.stat().st_mtime < ended - HANG_S / 4
    )
    with caplog.at_level(logging.WARNING):
        steps(watchdog, 2)
    messages = {record.message for record in caplog.records}  # pytest may capture a logger twice
    assert messages == {f"went on after 1 s without a step; stacks of that time: {path}"}
    watchdog.close()
    assert path.read_text() == stacks


def test_stacks_survive_a_kill(path):
    code = f"""
import os, time
from pathlib import Path
from lpl_pretrain.config.schema import WatchdogConfig
from lpl_pretrain.runtime.watchdog import Watchdog
watchdog = Watchdog(WatchdogConfig(at_least_s=0.3), Path({str(path)!r}))
[watchdog.step_done() for _ in range(9)]
time.sleep(1); os.kill(os.getpid(), 9)"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -9
    assert "<module>" in path.read_text()


@pytest.mark.parametrize(("factor", "hangs"), [(8, False), (1.5, True)])
def test_a_slow_step_is_no_hang(watch, path, factor, hangs):
    """The step takes longer than `at_least_s`; with a smaller factor it counts as a hang."""
    watchdog = watch(WatchdogConfig(factor=factor, at_least_s=0.1))
    steps(watchdog, seconds=0.2)
    steps(watchdog, 1, seconds=0.6)
    assert bool(path.stat().st_size) is hangs


@pytest.mark.parametrize("pausing", [True, False])
def test_a_pause_is_no_hang(watch, path, pausing):
    watchdog = watch()
    steps(watchdog)
    with watchdog.paused() if pausing else nullcontext():
        time.sleep(HANG_S)
    assert bool(path.stat().st_size) is not pausing
    steps(watchdog, 1)
    with watchdog.paused():
        pass
    time.sleep(HANG_S)
    assert path.stat().st_size, "the time limit is active again"


@pytest.mark.parametrize("missing", [1, 0])
def test_the_first_steps_may_take_any_time(watch, path, missing):
    steps(watch(), MIN_TIMED_STEPS + 1 - missing)
    time.sleep(HANG_S)
    assert bool(path.stat().st_size) is not missing


def test_an_empty_file_is_removed_and_earlier_dumps_are_kept(watch, path):
    watchdog = watch()
    steps(watchdog)
    watchdog.close()
    assert not path.exists()
    time.sleep(HANG_S)
    path.write_text("an earlier hang\n")
    second = watch()
    steps(second)
    second.close()
    assert path.read_text() == "an earlier hang\n"


def test_without_a_configuration_nothing_is_dumped(watch, path):
    watchdog = watch(None)
    steps(watchdog)
    time.sleep(HANG_S)
    with watchdog.paused():
        steps(watchdog)
    assert not path.exists()
