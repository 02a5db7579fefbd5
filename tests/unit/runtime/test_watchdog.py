"""Whatever a rank hangs in, its stacks are written; a rank that is merely slow, or paused, or has
just begun, writes nothing.
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
from lpl_pretrain.runtime.watchdog import AT_FIRST, Watchdog
from tests.support.commands import ROOT

HANG_S, QUICK = 1.0, WatchdogConfig(factor=4, at_least_s=0.4)
HELD = {
    "asleep": lambda: time.sleep(HANG_S),
    "for a lock": lambda: (lock := threading.Lock()).acquire() and lock.acquire(timeout=HANG_S),
    "with the interpreter locked": lambda: ctypes.PyDLL(None).usleep(int(1e6 * HANG_S)),
}


def steps(watchdog, count=AT_FIRST + 1, seconds=0.01):
    for _ in range(count):
        time.sleep(seconds)
        watchdog.step_done()


def here_it_hangs(how):
    HELD[how]()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "logs" / "stacks.txt"


@pytest.fixture
def watch(path):
    """Makes watchdogs of `path`; none outlives its test."""
    yield lambda config=QUICK: Watchdog(config, path)
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.parametrize("how", HELD)
def test_a_hang_leaves_the_stacks_of_all_threads(watch, path, how, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    watchdog, end = watch(), threading.Event()
    another = threading.Thread(target=end.wait, name="another")
    another.start()
    steps(watchdog)
    here_it_hangs(how)
    ended = time.time()
    end.set()
    told = path.read_text()
    assert (
        "in here_it_hangs" in told
        and told.count("Thread 0x") >= 2
        and path.stat().st_mtime < ended - HANG_S / 4
    )
    with caplog.at_level(logging.WARNING):
        steps(watchdog, 2)
    said = {record.message for record in caplog.records}  # pytest may hear a logger twice
    assert said == {f"went on after 1 s without a step; stacks of that time: {path}"}
    watchdog.close()
    assert path.read_text() == told


def test_stacks_survive_a_kill(path):
    code = f"""
import os, time; from pathlib import Path
from lpl_pretrain.config.schema import WatchdogConfig
from lpl_pretrain.runtime.watchdog import Watchdog
watchdog = Watchdog(WatchdogConfig(at_least_s=0.3), Path({str(path)!r}))
[watchdog.step_done() for _ in range(9)]
time.sleep(1); os.kill(os.getpid(), 9)"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -9
    assert "<module>" in path.read_text()


@pytest.mark.parametrize(("factor", "hangs"), [(8, False), (1.5, True)])
def test_a_slow_step_is_no_hang(watch, path, factor, hangs):
    """Longer than `at_least_s`; with a smaller factor it is one."""
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
    assert path.stat().st_size, "watched again"


@pytest.mark.parametrize("missing", [1, 0])
def test_the_first_steps_may_take_any_time(watch, path, missing):
    steps(watch(), AT_FIRST + 1 - missing)
    time.sleep(HANG_S)
    assert bool(path.stat().st_size) is not missing


def test_nothing_is_left_of_a_good_end_but_earlier_hangs(watch, path):
    watchdog = watch()
    steps(watchdog)
    watchdog.close()
    assert not path.exists()
    time.sleep(HANG_S)
    path.write_text("an earlier hang\n")
    again = watch()
    steps(again)
    again.close()
    assert path.read_text() == "an earlier hang\n"


def test_nobody_watches(watch, path):
    watchdog = watch(None)
    steps(watchdog)
    time.sleep(HANG_S)
    with watchdog.paused():
        steps(watchdog)
    assert not path.exists()
