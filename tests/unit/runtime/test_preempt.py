"""Effects of signals on a process, whatever its main thread is doing.

Each test starts a process that does not import torch.
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
mutex = ctypes.create_string_buffer(64)
libc = ctypes.CDLL(None)
libc.pthread_mutex_lock(mutex)
threading.Timer(0.3, write_stderr, ["ready"]).start()
libc.pthread_mutex_lock(mutex)  # blocks for ever, and no signal interrupts it
"""


def process(body: str, *, before: str = "") -> subprocess.Popen:
    """Starts a process that runs `body` with `stop`, its stop request; `body` prints "ready"."""
    script = (
        "from lpl_pretrain.runtime.preempt import *\nfrom lpl_pretrain.runtime.preempt import "
        "stop_request, write_stderr\n"
    )
    script += (
        "import time\n"
        "stop = stop_request().listen()\n"
        f"{textwrap.dedent(before)}\n"
        f"{textwrap.dedent(body)}"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )


def read_until(running: subprocess.Popen, text: str) -> str:
    """Reads stderr up to the first line that contains `text` and returns that line."""
    while text not in (line := running.stderr.readline()):
        assert line, f"no {text!r}"
    return line


def test_ctrl_c_ends_a_process_without_cleanup_at_once():
    running = process(BLOCKED)
    read_until(running, "ready")
    running.send_signal(signal.SIGINT)
    assert (
        running.communicate(timeout=60)[1] == "interrupted\n" and running.returncode == INTERRUPTED
    )


def test_ctrl_c_removes_temporary_files(tmp_path):
    body = f"""
    from pathlib import Path
    from lpl_pretrain.runtime.atomic import atomic_write
    try:
        with atomic_write(Path({str(tmp_path / "file")!r})) as temporary:
            temporary.write_text("half")
            write_stderr("ready")
            time.sleep(100)
    except Interrupted as interruption:
        write_stderr(f"caught: {{interruption}}")
    """
    running = process(body)
    read_until(running, "ready")
    assert list(tmp_path.iterdir())
    running.send_signal(signal.SIGINT)
    assert running.communicate(timeout=60)[1] == "caught: interrupted\n" and not list(
        tmp_path.iterdir()
    )


def test_a_blocked_main_thread_is_ended_after_the_grace_period():
    running = process(
        BLOCKED,
        before="import lpl_pretrain.runtime.preempt as p; p.GRACE_S = 0.2; stop.has_cleanup = True",
    )
    read_until(running, "ready")
    running.send_signal(signal.SIGINT)
    assert (
        running.communicate(timeout=60)[1] == "interrupted\n" and running.returncode == INTERRUPTED
    )


def test_between_steps_ctrl_c_only_sets_a_flag():
    before = """
    import threading
    import lpl_pretrain.runtime.preempt as preempt
    stop.finishes_step = True
    printed = threading.Event()
    preempt.write_stderr = lambda text: (write_stderr(text), printed.set())
    """
    running = process(
        "write_stderr('ready')\nwhile not stop: time.sleep(0.01)\n"
        "printed.wait(60)\nwrite_stderr(stop.signal_name)",
        before=before,
    )
    read_until(running, "ready")
    running.send_signal(signal.SIGINT)
    lines = running.communicate(timeout=60)[1].splitlines()
    assert (
        running.returncode == 0
        and "SIGINT" in lines
        and "a second Ctrl-C ends the process at once" in "".join(lines)
    )


@pytest.mark.parametrize("second", ["SIGINT", "SIGTERM"])
def test_a_second_ctrl_c_ends_a_process_that_is_blocked_in_c(second):
    """Such as in a collective that waits for a lost rank.  Under torchrun it arrives as SIGTERM."""
    running = process(
        BLOCKED, before=f"stop.finishes_step, stop.under_torchrun = True, {second == 'SIGTERM'}"
    )
    read_until(running, "ready")
    running.send_signal(signal.SIGINT)
    read_until(running, "a second Ctrl-C ends the process at once")
    running.send_signal(getattr(signal, second))
    assert (
        running.communicate(timeout=60)[1] == "interrupted\n" and running.returncode == INTERRUPTED
    )


def test_an_interrupt_in_a_finalizer_ends_the_process():
    """Python by default prints an exception of a finalizer and continues."""
    body = """
    class Last:
        def __del__(self):
            write_stderr("ready")
            for _ in range(1000):
                time.sleep(0.1)
    del [Last()][0]
    write_stderr("continued")
    """
    running = process(body, before="stop.has_cleanup = True")
    read_until(running, "ready")
    running.send_signal(signal.SIGINT)
    output = running.communicate(timeout=60)[1]
    assert output == "interrupted\n" and running.returncode == INTERRUPTED


def test_sigterm_ends_a_blocked_rank_after_another_rank_has_failed():
    running = process(BLOCKED, before="stop.peer_failed = lambda: True")
    read_until(running, "ready")
    running.send_signal(signal.SIGTERM)
    assert running.communicate(timeout=60)[1] == "" and running.returncode == 1


@pytest.mark.parametrize(
    "under_torchrun, number, elapsed_s, is_second",
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
def test_signals_that_count_as_a_second_ctrl_c(under_torchrun, number, elapsed_s, is_second):
    """Under torchrun a process may receive the signal itself and the copy that torchrun sends."""
    stop = StopRequest()
    stop.under_torchrun = under_torchrun
    assert stop._is_second_ctrl_c(number, elapsed_s) == is_second


def test_ctrl_c_ends_every_command_with_one_line_and_status_130():
    """One function runs all commands, those of `python -m launch` included."""
    body = """
    import click
    from lpl_pretrain.cli.main import run
    @click.command()
    def wait():
        stop.has_cleanup = True
        try:
            write_stderr("ready")
            time.sleep(100)
        finally:
            write_stderr("cleaned up")
    run(wait)
    """
    running = process(body)
    read_until(running, "ready")
    running.send_signal(signal.SIGINT)
    assert (
        running.communicate(timeout=60)[1] == "cleaned up\ninterrupted\n"
        and running.returncode == INTERRUPTED
    )


def test_an_error_after_ctrl_c_is_one_line():
    body = """
    import click
    from lpl_pretrain.cli.main import run
    @click.command()
    def train():
        write_stderr("ready")
        while not stop: time.sleep(0.01)
        raise RuntimeError("Connection closed by peer\\nand more")
    run(train)
    """
    running = process(body, before="stop.finishes_step = True")
    read_until(running, "ready")
    running.send_signal(signal.SIGINT)
    lines = running.communicate(timeout=60)[1].splitlines()
    assert (
        lines[-1] == "interrupted (RuntimeError: Connection closed by peer)"
        and running.returncode == INTERRUPTED
    )


def test_repeated_signals_of_a_scheduler_do_not_end_the_process():
    running = process("write_stderr('ready')\ntime.sleep(0.5)\nwrite_stderr(stop.signal_name)")
    read_until(running, "ready")
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM):
        running.send_signal(number)
    assert "SIG" in running.communicate(timeout=60)[1] and running.returncode == 0
