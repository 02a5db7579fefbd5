"""Runs `lpl-pretrain` as a user does, in processes of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support import warm

ROOT = Path(__file__).resolve().parents[2]


def lpl(*arguments, check=True, ranks=1, cold=False, **options):
    """`cold`: with all imports of its own."""
    python = [*([] if cold else warm.prefix()), sys.executable, "-m"]
    torchrun = [*python, "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--no-python"] if ranks > 1 else []
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


def lines(run, key="step"):
    """Whole ones: a run that goes on may be writing another, and a full disk cuts one short."""
    text = (run / "metrics.jsonl").read_text()
    found = []
    for line in text[: text.rfind("\n") + 1].splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found
