"""What signals do to a process, whatever its main thread is busy with: in processes of their own,
which import no torch.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lpl_pretrain.runtime.preempt import DELIVERY_S, INTERRUPTED, StopRequest

ROOT = Path(__file__).resolve().parents[3]
BLOCKED = """
import ctypes, threading
mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
libc.pthread_mutex_lock(mutex)
threading.Timer(0.3, say, ["ready"]).start()
libc.pthread_mutex_lock(mutex)  # for ever, and no signal ends it
"""


def process(body: str, *, before: str = "") -> subprocess.Popen:
    """`body` runs with `stop`, the request of this process, and says when it is ready."""
    script = (
        "from lpl_pretrain.runtime.preempt import *\nfrom lpl_pretrain.runtime.preempt import "
        "say, stop_request\n"
    )
    script += (
        "import time\nstop = "
        f"stop_request().listen()\n{textwrap.dedent(before)}\n{textwrap.dedent(body)}"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )


def until(running: subprocess.Popen, word: str) -> str:
    """The line with `word` in it."""
    while word not in (line := running.stderr.readline()):
        assert line, f"no {word!r}"
    return line


def test_ctrl_c_while_there_is_nothing_to_remove():
    running = process(BLOCKED)
    until(running, "ready")
    running.send_signal(signal.SIGINT)
    assert (
        running.communicate(timeout=60)[1] == "interrupted\n" and running.returncode == INTERRUPTED
    )


def test_ctrl_c_removes_what_lies_about(tmp_path):
    body = f"""
    from pathlib import Path
    from lpl_pretrain.runtime.atomic import atomic_write
    try:
        with atomic_write(Path({str(tmp_path / "file")!r})) as temporary:
            temporary.write_text("half")
            say("ready")
            time.sleep(100)
    except Interrupted as interruption:
        say(f"caught: {{interruption}}")
    """
    running = process(body)
    until(running, "ready")
    assert list(tmp_path.iterdir())
    running.send_signal(signal.SIGINT)
    assert running.communicate(timeout=60)[1] == "caught: interrupted\n" and not list(
        tmp_path.iterdir()
    )


def test_a_main_thread_that_does_not_come_back_is_left_after_a_while():
    running = process(
        BLOCKED,
        before="import lpl_pretrain.runtime.preempt as p; p.GRACE_S = 0.2; stop.unwinds = True",
    )
    until(running, "ready")
    running.send_signal(signal.SIGINT)
    assert (
        running.communicate(timeout=60)[1] == "interrupted\n" and running.returncode == INTERRUPTED
    )


def test_between_steps_it_is_a_flag():
    before = """
    import threading
    import lpl_pretrain.runtime.preempt as preempt
    stop.finishes_step, told = True, threading.Event()
    preempt.say = lambda text: (say(text), told.set())
    """
    running = process(
        "say('ready')\nwhile not stop: time.sleep(0.01)\ntold.wait(60)\nsay(stop.signal_name)",
        before=before,
    )
    until(running, "ready")
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=60)[1].splitlines()
    assert (
        running.returncode == 0
        and "SIGINT" in said
        and "a second Ctrl-C leaves at once" in "".join(said)
    )


@pytest.mark.parametrize("second", ["SIGINT", "SIGTERM"])
def test_a_second_one_ends_a_process_that_is_stuck_in_c(second):
    """In a collective that waits for a rank that is gone, say.  Under torchrun it comes as SIGTERM."""
    running = process(
        BLOCKED, before=f"stop.finishes_step, stop.torchrun = True, {second == 'SIGTERM'}"
    )
    until(running, "ready")
    running.send_signal(signal.SIGINT)
    until(running, "a second Ctrl-C leaves at once")
    running.send_signal(getattr(signal, second))
    assert (
        running.communicate(timeout=60)[1] == "interrupted\n" and running.returncode == INTERRUPTED
    )


def test_what_is_raised_in_a_finalizer_is_not_lost():
    """Python prints such an exception and goes on."""
    body = """
    class Last:
        def __del__(self):
            say("ready")
            for _ in range(1000):
                time.sleep(0.1)
    del [Last()][0]
    say("went on")
    """
    running = process(body, before="stop.unwinds = True")
    until(running, "ready")
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=60)[1]
    assert said == "interrupted\n" and running.returncode == INTERRUPTED


def test_a_rank_that_waits_for_one_that_has_failed_ends_when_torchrun_ends_it():
    running = process(BLOCKED, before="stop.peer_failed = lambda: True")
    until(running, "ready")
    running.send_signal(signal.SIGTERM)
    assert running.communicate(timeout=60)[1] == "" and running.returncode == 1


@pytest.mark.parametrize(
    "torchrun, number, after_s, insists",
    [
        (False, signal.SIGINT, 0.0, True),
        (False, signal.SIGTERM, 9.0, False),
        (False, signal.SIGUSR2, 9.0, False),
        (True, signal.SIGINT, DELIVERY_S / 2, False),
        (True, signal.SIGINT, DELIVERY_S * 2, True),
        (True, signal.SIGTERM, 0.0, True),
        (True, signal.SIGUSR2, 9.0, False),
    ],
)
def test_what_counts_as_a_second_one(torchrun, number, after_s, insists):
    """Under torchrun all processes may get the signal that torchrun also passes on."""
    stop = StopRequest()
    stop.torchrun = torchrun
    assert stop._insists(number, after_s) == insists


def test_every_command_ends_with_a_line_and_the_status_of_ctrl_c():
    """Those of `python -m launch` too: all are run by one function."""
    body = """
    import click
    from lpl_pretrain.cli.main import run
    @click.command()
    def wait():
        stop.unwinds = True
        try:
            say("ready")
            time.sleep(100)
        finally:
            say("cleaned up")
    run(wait)
    """
    running = process(body)
    until(running, "ready")
    running.send_signal(signal.SIGINT)
    assert (
        running.communicate(timeout=60)[1] == "cleaned up\ninterrupted\n"
        and running.returncode == INTERRUPTED
    )


def test_what_other_ranks_run_into_after_ctrl_c_is_one_line():
    body = """
    import click
    from lpl_pretrain.cli.main import run
    @click.command()
    def train():
        say("ready")
        while not stop: time.sleep(0.01)
        raise RuntimeError("Connection closed by peer\\nand more")
    run(train)
    """
    running = process(body, before="stop.finishes_step = True")
    until(running, "ready")
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=60)[1].splitlines()
    assert (
        said[-1] == "interrupted (RuntimeError: Connection closed by peer)"
        and running.returncode == INTERRUPTED
    )


def test_schedulers_signals_do_not_add_up():
    running = process("say('ready')\ntime.sleep(0.5)\nsay(stop.signal_name)")
    until(running, "ready")
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM):
        running.send_signal(number)
    assert "SIG" in running.communicate(timeout=60)[1] and running.returncode == 0
