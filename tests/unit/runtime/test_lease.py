"""A lease has one holder at a time, and the lease of a dead holder is taken over by one process."""

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
from lpl_pretrain.runtime.lease import Lease, describe_holder, is_stale, read_lease


def test_one_holder_and_the_next(tmp_path):
    path = tmp_path / "x.lease"
    with Lease(path) as first:
        assert first.held and read_lease(path)["pid"] == os.getpid()
        with Lease(path) as second:
            assert not second.held
        assert first.held, "a failed attempt does not change the lease"
    assert not list(tmp_path.iterdir())
    with Lease(path) as third:
        assert third.held


def interrupted_at(line: int, action) -> bool:
    """Presses Ctrl-C before line `line` of the methods that create and remove files; returns
    whether `action` reached it.
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


@pytest.mark.parametrize("held_by", ["no process", "a killed process"])
def test_ctrl_c_at_any_line_of_take_and_release_leaves_no_file(tmp_path, monkeypatch, held_by):
    path = tmp_path / "x.lease"
    lines = 0
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


def test_a_live_holder_is_not_stale(tmp_path):
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


def test_the_lease_of_a_killed_holder_is_taken_over(tmp_path):
    """A takeover is immediate on the holder's host and waits for `stale_s` on any other host."""
    path = tmp_path / "x.lease"
    hold_and_die(path)
    elsewhere = {**read_lease(path), "host": "another"}
    with Lease(path, stale_s=60) as successor:
        assert successor.held
    path.write_text(json.dumps(elsewhere))
    with Lease(path, stale_s=60) as early:
        assert not early.held
    time.sleep(0.4)
    with Lease(path, stale_s=0.3) as successor:
        assert successor.held
    assert not list(tmp_path.iterdir())


def test_a_requeued_job_takes_over_its_own_lease(tmp_path):
    path = tmp_path / "x.lease"
    path.write_text(json.dumps({"token": "x", "job": "17", "host": "another", "pid": 1}))
    with Lease(path, job="18") as other:
        assert not other.held
    with Lease(path, job="17") as same:
        assert same.held


@pytest.mark.parametrize("dead", [False, True])
def test_one_of_many_concurrent_processes_gets_the_lease(tmp_path, dead):
    """The processes start with (`dead`) or without the lease of a dead holder."""
    path = tmp_path / "x.lease"
    if dead:
        hold_and_die(path)
        os.utime(path, (0, 0))
    assert num_holders(path) == 1


def num_holders(path):
    """Forks eight processes that try to take the lease at the same moment; returns how many hold it
    after all have tried.
    """
    start = time.time() + 0.3
    pids = []
    tried_read, tried_write = os.pipe()
    over_read, over_write = os.pipe()
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            os.close(over_write)
            time.sleep(max(0.0, start - time.time()))
            with Lease(path) as lease:
                won = lease.held
                os.write(tried_write, b".")
                os.read(over_read, 1)  # until the parent closes the other end
                os._exit(1 if won and lease.held else 0)
        pids.append(pid)
    for _ in pids:
        os.read(tried_read, 1)
    os.close(over_write)
    holders = sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)
    for descriptor in (tried_read, tried_write, over_read):
        os.close(descriptor)
    return holders


def test_a_former_holder_does_not_remove_the_successors_lease(tmp_path):
    path = tmp_path / "x.lease"
    with Lease(path, touch_s=60) as suspended:
        os.utime(path, (0, 0))  # as if it had been suspended
        with Lease(path) as successor:
            assert successor.held and not suspended.held
            suspended.__exit__()
            assert successor.held


def test_a_former_holder_learns_of_its_loss(tmp_path):
    """`on_loss` is called by `check_ownership`, and after a while by the thread; the thread no
    longer touches the lease, which becomes stale when its new holder dies.
    """
    path = tmp_path / "x.lease"
    losses = []
    with Lease(path, job="17", touch_s=0.05, on_loss=lambda: losses.append("lost")) as holder:
        holder.check_ownership()
        time.sleep(0.2)
        assert not losses
        with Lease(path, job="17", touch_s=60):
            holder.check_ownership()
            assert losses
            losses.clear()
            os.utime(path, (0, 0))
            time.sleep(0.2)
            assert losses and is_stale(path)


VALID = {"token": "x", "job": "", "host": "another", "pid": 1}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps({**VALID, "pid": "1"}).encode(),
        json.dumps({**VALID, "pid": -1}).encode(),
        json.dumps({**VALID, "pid": True}).encode(),
        json.dumps({**VALID, "token": None}).encode(),
        json.dumps({**VALID, "host": ["a"]}).encode(),
        json.dumps({key: value for key, value in VALID.items() if key != "pid"}).encode(),
        b'{"token": "x", "token": "y", "job": "", "host": "another", "pid": 1}',
        json.dumps({**VALID, "more": "x" * (1 << 17)}).encode(),
    ],
)
def test_an_invalid_lease_is_taken_over_at_once(tmp_path, content):
    """A lease is created complete, so an incomplete one has no holder; a valid one is respected."""
    path = tmp_path / "x.lease"
    path.write_text(json.dumps(VALID))
    with Lease(path) as lease:
        assert not lease.held and not is_stale(path)
    path.write_bytes(content)
    assert is_stale(path) and read_lease(path) == {}
    with Lease(path) as lease:
        assert lease.held
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["nowhere", "other"])
def test_a_link_or_a_pipe_is_taken_over(tmp_path, target):
    """The link's target does not change."""
    path = tmp_path / "x.lease"
    other = tmp_path / "other"
    other.write_text(json.dumps(VALID))
    path.symlink_to(tmp_path / target)
    with Lease(path) as lease:
        assert lease.held
    os.mkfifo(path)
    with Lease(path) as lease:
        assert lease.held
    assert json.loads(other.read_text()) == VALID


def test_a_lease_with_a_future_time_is_taken_over(tmp_path):
    """A live holder touches it by the same clock, so that it cannot be ahead by minutes."""
    path = tmp_path / "x.lease"
    path.write_text(json.dumps(VALID))
    os.utime(path, (ahead := time.time() + 60, ahead))
    assert not is_stale(path)
    os.utime(path, (ahead := time.time() + 3600, ahead))
    with Lease(path) as lease:
        assert lease.held


def test_a_directory_instead_of_a_lease_is_an_error(tmp_path):
    path = tmp_path / "x.lease"
    path.mkdir()
    assert is_stale(path), "it does not protect a checkpoint from removal"
    with pytest.raises(
        CheckpointError, match="x.lease: is a directory, wanted a lease file or nothing: remove it"
    ):
        Lease(path).take()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="the lease cannot be taken: "):
        Lease(tmp_path / "file" / "x.lease").take()


def test_an_unreadable_lease_is_respected_until_it_is_stale(tmp_path, monkeypatch):
    """An unreadable lease may be another user's; messages do not call its holder "None"."""
    path = tmp_path / "x.lease"
    path.write_text(json.dumps(VALID))
    assert describe_holder(path) == "process 1 on another"
    refuse = os.strerror(errno.EACCES)
    monkeypatch.setattr(
        type(path),
        "read_bytes",
        lambda self: _raise(PermissionError(errno.EACCES, refuse, str(self))),
    )
    assert not Lease(path).take() and "None" not in describe_holder(path)
    os.utime(path, (0, 0))
    assert is_stale(path)


def test_a_file_system_error_is_not_a_loss(tmp_path, monkeypatch):
    """A holder that temporarily cannot read its lease has not lost it."""
    path = tmp_path / "x.lease"
    losses = []
    with Lease(path, on_loss=lambda: losses.append("lost")) as lease:
        with monkeypatch.context() as patch:
            patch.setattr(
                type(path), "read_bytes", lambda self: _raise(OSError(errno.EIO, "I/O error"))
            )
            with pytest.raises(OSError, match="I/O error"):
                lease.check_ownership()
        lease.check_ownership()
    assert not losses


def _raise(error):
    raise error


def test_a_full_disk_is_a_transient_error(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Lease, "_create", lambda self: _raise(OSError(errno.ENOSPC, "No space left on device"))
    )
    with pytest.raises(SaveError, match="No space left on device") as caught:
        Lease(tmp_path / "x.lease").take()
    assert caught.value.status == 1


@pytest.mark.parametrize("content", [b"", b"{"])
def test_one_of_many_concurrent_processes_takes_over_an_incomplete_lease(tmp_path, content):
    (tmp_path / "x.lease").write_bytes(content)
    assert num_holders(tmp_path / "x.lease") == 1


def test_a_released_lease_is_not_a_lost_one(tmp_path):
    """A background save may check after an error has ended training; the user must see that one."""
    lost = []
    with Lease(tmp_path / "x.lease", on_loss=lambda: lost.append(1)) as lease:
        lease.check_ownership()
    with pytest.raises(SaveError, match="x.lease: was released"):
        lease.check_ownership()
    assert not lost
