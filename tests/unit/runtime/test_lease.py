"""One holder at a time, whoever dies; a dead one's lease is taken over by one worker."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from lpl_pretrain.runtime.lease import Lease, is_stale, read_lease


def test_one_holder_and_the_next(tmp_path):
    path = tmp_path / "x.lease"
    with Lease(path) as first:
        assert first.held and read_lease(path)["pid"] == os.getpid()
        with Lease(path) as second:
            assert not second.held
        assert first.held, "whoever did not get it leaves it alone"
    assert not list(tmp_path.iterdir())
    with Lease(path) as third:
        assert third.held


def test_a_holder_that_lives_is_not_stale(tmp_path):
    path = tmp_path / "x.lease"
    with Lease(path, stale_s=0.5, touch_s=0.05) as holder:
        time.sleep(0.8)
        assert not is_stale(path, 0.5)
        with Lease(path, stale_s=0.5) as other:
            assert not other.held
        assert holder.held


def hold_and_die(path):
    pid = os.fork()
    if pid == 0:
        with Lease(path, touch_s=0.05):
            time.sleep(30)
        os._exit(0)
    while not path.exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_killed_holder_is_succeeded(tmp_path):
    """On this host at once; a holder elsewhere, whom nobody can ask, is waited for."""
    path = tmp_path / "x.lease"
    hold_and_die(path)
    elsewhere = {**read_lease(path), "host": "another"}
    with Lease(path, stale_s=60) as heir:
        assert heir.held
    path.write_text(json.dumps(elsewhere))
    with Lease(path, stale_s=60) as early:
        assert not early.held
    time.sleep(0.4)
    with Lease(path, stale_s=0.3) as heir:
        assert heir.held
    assert not list(tmp_path.iterdir())


def test_a_requeued_job_takes_up_its_own(tmp_path):
    path = tmp_path / "x.lease"
    path.write_text(json.dumps({"token": "x", "job": "17", "host": "another", "pid": 1}))
    with Lease(path, job="18") as other:
        assert not other.held
    with Lease(path, job="17") as same:
        assert same.held


@pytest.mark.parametrize("dead", [False, True])
def test_of_many_at_once_one_gets_it(tmp_path, dead):
    """Forked, all at the same moment; with and without a dead holder in the way."""
    path, start = tmp_path / "x.lease", time.time() + 0.3
    if dead:
        hold_and_die(path)
        os.utime(path, (0, 0))
    pids = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            time.sleep(max(0.0, start - time.time()))
            with Lease(path) as lease:
                won = lease.held
                time.sleep(0.5 if won else 0.0)
                os._exit(1 if won and lease.held else 0)
        pids.append(pid)
    assert sum(os.waitpid(pid, 0)[1] != 0 for pid in pids) == 1


def test_who_was_taken_over_does_not_remove_the_heirs(tmp_path):
    path = tmp_path / "x.lease"
    with Lease(path, touch_s=60) as asleep:
        os.utime(path, (0, 0))  # as if it had been suspended
        with Lease(path) as heir:
            assert heir.held and not asleep.held
            asleep.__exit__()
            assert heir.held


def test_who_was_taken_over_is_told(tmp_path):
    """When it asks, and by itself after a while; and it touches the heir's lease no more, which goes stale when that one dies."""
    path, told = tmp_path / "x.lease", []
    with Lease(path, job="17", touch_s=0.05, on_loss=lambda: told.append("cut off")) as holder:
        holder.check()
        time.sleep(0.2)
        assert not told
        with Lease(path, job="17", touch_s=60):
            holder.check()
            assert told
            told.clear()
            os.utime(path, (0, 0))
            time.sleep(0.2)
            assert told and is_stale(path)
