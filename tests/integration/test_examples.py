"""The scripts of examples/ run as their docstrings say."""

import os
import re
import subprocess
import sys

import pytest

from tests.support import fork_server
from tests.support.commands import ROOT, metric_lines
from tests.support.latents import tiny_dataset

MAX_LINES = {"lpl_in_your_own_loop": 40, "train_from_python": 30}
"""Examples are read before they are run."""


def run_example(name, *arguments):
    python = [*fork_server.command_prefix(), sys.executable]
    done = subprocess.run(
        [*python, "-m", f"examples.{name}", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_lpl_in_your_own_loop():
    losses = [
        float(loss) for loss in re.findall(r"LPL ([0-9.]+)", run_example("lpl_in_your_own_loop"))
    ]
    assert len(losses) == 10 and max(losses) > 0


def test_train_from_python_makes_its_steps_and_resumes(tmp_path):
    latents, autoencoder = tiny_dataset(tmp_path / "data")
    run = tmp_path / "run"
    overrides = [
        f"run_dir={run}",
        f"data.folder={latents}",
        f"autoencoder={autoencoder}",
        "model.width=32",
        "model.depth=2",
        "model.heads=2",
        "batch.global_batch_size=8",
        "optimizer.lr_schedule=constant",
        "lpl.start_step=1",
        "lpl.calibration_steps=1",
        "log.every_steps=1",
        "preflight=null",
    ]
    assert "step 4, loss" in run_example("train_from_python", *overrides, "steps=4")
    assert "step 6, loss" in run_example("train_from_python", *overrides, "steps=6")
    steps = [line["step"] for line in metric_lines(run) if "event" not in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    before = (run / "metrics.jsonl").read_bytes()
    assert "step 6, loss" in run_example("train_from_python", *overrides, "steps=6")
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", MAX_LINES)
def test_examples_are_short(name):
    lines = (ROOT / "examples" / f"{name}.py").read_text().splitlines()
    assert len(lines) <= MAX_LINES[name]


def test_every_example_is_tested():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == MAX_LINES.keys()
