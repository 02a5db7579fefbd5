"""One holder at a time, whoever dies; a dead one's lease is taken over by one worker."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time

import pytest

from lpl_pretrain.errors import CheckpointError, SaveError
from lpl_pretrain.runtime import preempt
from lpl_pretrain.runtime.lease import Lease, holder_of, is_stale, read_lease


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


def interrupted_at(line: int, action) -> bool:
    """Whether `action` got so far: Ctrl-C comes before that line of the methods that make and
    remove files.
    """
    left = line

    def trace(frame, event, _argument):
        nonlocal left
        code = frame.f_code
        if not code.co_filename.endswith("runtime/lease.py") or code.co_name in (
            "take",
            "release",
            "__enter__",
            "__exit__",
        ):
            return None
        if event == "line":
            left -= 1
            if left == -1:
                preempt._current._note(signal.SIGINT, None)
        return trace

    sys.settrace(trace)
    try:
        action()
    except preempt.Interrupted:
        assert left < 0
    finally:
        sys.settrace(None)
    return left < 0


@pytest.mark.parametrize("held_by", ["nobody", "a killed process"])
def test_ctrl_c_anywhere_while_it_is_taken_and_released_leaves_nothing(
    tmp_path, monkeypatch, held_by
):
    path, lines = tmp_path / "x.lease", 0
    while True:
        monkeypatch.setattr(preempt, "_current", preempt.StopRequest())
        if held_by == "a killed process":
            hold_and_die(path)
        lease = Lease(path)

        def take_and_release(lease=lease):
            with lease:
                pass

        reached = interrupted_at(lines, take_and_release)
        assert read_lease(path).get("token") != lease.token, f"line {lines}"
        left = [file.name for file in tmp_path.iterdir() if file != path]
        assert not left, f"line {lines}"
        if not reached:
            break
        lines += 1
    assert lines > 30


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
    path = tmp_path / "x.lease"
    if dead:
        hold_and_die(path)
        os.utime(path, (0, 0))
    assert winners(path) == 1


def winners(path):
    """How many of eight processes, forked, try for it at the same moment and have it when all have
    tried.
    """
    start, pids = time.time() + 0.3, []
    (tried, try_), (over, end) = os.pipe(), os.pipe()
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            os.close(end)
            time.sleep(max(0.0, start - time.time()))
            with Lease(path) as lease:
                won = lease.held
                os.write(try_, b".")
                os.read(over, 1)  # until the parent closes the other end
                os._exit(1 if won and lease.held else 0)
        pids.append(pid)
    for _ in pids:
        os.read(tried, 1)
    os.close(end)
    found = sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)
    for handle in (tried, try_, over):
        os.close(handle)
    return found


def test_who_was_taken_over_does_not_remove_the_heirs(tmp_path):
    path = tmp_path / "x.lease"
    with Lease(path, touch_s=60) as asleep:
        os.utime(path, (0, 0))  # as if it had been suspended
        with Lease(path) as heir:
            assert heir.held and not asleep.held
            asleep.__exit__()
            assert heir.held


def test_who_was_taken_over_is_told(tmp_path):
    """When it asks, and by itself after a while; and it touches the heir's lease no more, which
    goes stale when that one dies.
    """
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


WHOLE = {"token": "x", "job": "", "host": "another", "pid": 1}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps({**WHOLE, "pid": "1"}).encode(),
        json.dumps({**WHOLE, "pid": -1}).encode(),
        json.dumps({**WHOLE, "pid": True}).encode(),
        json.dumps({**WHOLE, "token": None}).encode(),
        json.dumps({**WHOLE, "host": ["a"]}).encode(),
        json.dumps({key: value for key, value in WHOLE.items() if key != "pid"}).encode(),
        b'{"token": "x", "token": "y", "job": "", "host": "another", "pid": 1}',
        json.dumps({**WHOLE, "more": "x" * (1 << 17)}).encode(),
    ],
)
def test_what_no_worker_writes_is_nobodys(tmp_path, content):
    """A lease appears whole, so that a torn one need not be waited for; and one like it that is
    whole is respected.
    """
    path = tmp_path / "x.lease"
    path.write_text(json.dumps(WHOLE))
    with Lease(path) as lease:
        assert not lease.held and not is_stale(path)
    path.write_bytes(content)
    assert is_stale(path) and read_lease(path) == {}
    with Lease(path) as lease:
        assert lease.held
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["nowhere", "other"])
def test_a_link_or_a_pipe_is_nobodys(tmp_path, target):
    """What it points to is left alone."""
    path, other = tmp_path / "x.lease", tmp_path / "other"
    other.write_text(json.dumps(WHOLE))
    path.symlink_to(tmp_path / target)
    with Lease(path) as lease:
        assert lease.held
    os.mkfifo(path)
    with Lease(path) as lease:
        assert lease.held
    assert json.loads(other.read_text()) == WHOLE


def test_a_lease_of_the_future_is_nobodys(tmp_path):
    """A living holder touches it by the same clock, so that it cannot be ahead by minutes."""
    path = tmp_path / "x.lease"
    path.write_text(json.dumps(WHOLE))
    os.utime(path, (ahead := time.time() + 60, ahead))
    assert not is_stale(path)
    os.utime(path, (ahead := time.time() + 3600, ahead))
    with Lease(path) as lease:
        assert lease.held


def test_a_directory_in_its_place_is_named(tmp_path):
    path = tmp_path / "x.lease"
    path.mkdir()
    assert is_stale(path), "it keeps no checkpoint from being removed"
    with pytest.raises(
        CheckpointError, match="x.lease: is a directory, wanted a lease file or nothing: remove it"
    ):
        Lease(path).take()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="the lease cannot be taken: "):
        Lease(tmp_path / "file" / "x.lease").take()


def test_a_lease_that_cannot_be_read_is_waited_for(tmp_path, monkeypatch):
    """It may be another user's; nobody is called "None"."""
    path = tmp_path / "x.lease"
    path.write_text(json.dumps(WHOLE))
    assert holder_of(path) == "process 1 on another"
    refuse = os.strerror(errno.EACCES)
    monkeypatch.setattr(
        type(path),
        "read_bytes",
        lambda self: _raise(PermissionError(errno.EACCES, refuse, str(self))),
    )
    assert not Lease(path).take() and "None" not in holder_of(path)
    os.utime(path, (0, 0))
    assert is_stale(path)


def test_an_error_of_the_file_system_ends_nobody(tmp_path, monkeypatch):
    """A holder that cannot read its lease for a moment has not lost it."""
    path, told = tmp_path / "x.lease", []
    with Lease(path, on_loss=lambda: told.append("lost")) as lease:
        with monkeypatch.context() as patch:
            patch.setattr(
                type(path), "read_bytes", lambda self: _raise(OSError(errno.EIO, "I/O error"))
            )
            with pytest.raises(OSError, match="I/O error"):
                lease.check()
        lease.check()
    assert not told


def _raise(error):
    raise error


def test_a_full_disk_may_be_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Lease, "_take", lambda self: _raise(OSError(errno.ENOSPC, "No space left on device"))
    )
    with pytest.raises(SaveError, match="No space left on device") as caught:
        Lease(tmp_path / "x.lease").take()
    assert caught.value.status == 1


@pytest.mark.parametrize("torn", [b"", b"{"])
def test_of_many_at_once_one_gets_a_torn_one(tmp_path, torn):
    (tmp_path / "x.lease").write_bytes(torn)
    assert winners(tmp_path / "x.lease") == 1


def test_a_released_lease_is_not_a_lost_one(tmp_path):
    """A save in the background may ask after an error has ended the training: that error is what is
    told.
    """
    lost = []
    with Lease(tmp_path / "x.lease", on_loss=lambda: lost.append(1)) as lease:
        lease.check()
    with pytest.raises(SaveError, match="x.lease: was released"):
        lease.check()
    assert not lost
