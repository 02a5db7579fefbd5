"""Runs of `lpl-pretrain` in processes of their own, and what they log."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support import fork_server

ROOT = Path(__file__).resolve().parents[2]


def _command(arguments, ranks, cold):
    """Words of a command line, under torchrun for more than one rank."""
    python = [*([] if cold else fork_server.command_prefix()), sys.executable, "-m"]
    torchrun = []
    if ranks > 1:
        rank_options = ["--standalone", f"--nproc-per-node={ranks}", "--no-python"]
        torchrun = [*python, "torch.distributed.run", *rank_options]
    return [*torchrun, *python, "lpl_pretrain", *map(str, arguments)]


def lpl(*arguments, check=True, ranks=1, cold=False, **options):
    """Run `lpl-pretrain` to its end; `cold` starts Python anew, without the fork server."""
    done = subprocess.run(
        _command(arguments, ranks, cold),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def start_lpl(*arguments, ranks=1, cold=False):
    """Start `lpl-pretrain` in a process group of its own, as a terminal does."""
    return subprocess.Popen(
        _command(arguments, ranks, cold),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def wait_for(process, condition, limit_s=200.0):
    """Poll until `condition()` holds; fail when `process` ends before."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "".join(
            process.communicate()
        )
        time.sleep(0.02)


def ctrl_c(process):
    """Send SIGINT to the process group, as a terminal does."""
    os.killpg(process.pid, signal.SIGINT)


def folder_state(folder):
    """Map each path in a folder, and the folder itself, to (bytes, modification time)."""
    return {
        path: (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
        for path in [folder, *sorted(folder.rglob("*"))]
    }


def metric_lines(run, key="step"):
    """Complete lines of metrics.jsonl: a running process or a full disk may leave a partial one."""
    text = (run / "metrics.jsonl").read_text()
    records = []
    for line in text[: text.rfind("\n") + 1].splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def logged_losses(run):
    """Map each step to its loss; the last line of a step counts."""
    return {line["step"]: line["loss/total"] for line in metric_lines(run) if "event" not in line}
