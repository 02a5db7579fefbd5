"""Runs `lpl-pretrain` as a user does, in processes of its own."""

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


def lpl(*arguments, check=True, ranks=1, cold=False, **options):
    """`cold`: with all imports of its own."""
    python = [*([] if cold else fork_server.command_prefix()), sys.executable, "-m"]
    torchrun = (
        [
            *python,
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            "--no-python",
        ]
        if ranks > 1
        else []
    )
    done = subprocess.run(
        [*torchrun, *python, "lpl_pretrain", *map(str, arguments)],
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
    """The same, in the background, as a terminal starts it: in a process group of its own."""
    python = [*([] if cold else fork_server.command_prefix()), sys.executable, "-m"]
    torchrun = (
        [
            *python,
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            "--no-python",
        ]
        if ranks > 1
        else []
    )
    return subprocess.Popen(
        [*torchrun, *python, "lpl_pretrain", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def wait_for(process, condition, limit_s=200.0):
    """Until `condition()`, while `process` runs."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "".join(
            process.communicate()
        )
        time.sleep(0.02)


def ctrl_c(process):
    """What a terminal does: SIGINT to the process group."""
    os.killpg(process.pid, signal.SIGINT)


def folder_state(folder):
    """Path -> (bytes, time of the last change) of everything in a folder, and of the folder."""
    return {
        path: (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
        for path in [folder, *sorted(folder.rglob("*"))]
    }


def metric_lines(run, key="step"):
    """Whole ones: a run that goes on may be writing another, and a full disk cuts one short."""
    text = (run / "metrics.jsonl").read_text()
    found = []
    for line in text[: text.rfind("\n") + 1].splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def logged_losses(run):
    """Step -> loss; the last line of a step counts."""
    return {line["step"]: line["loss/total"] for line in metric_lines(run) if "event" not in line}
