"""Ctrl-C on real processes: it saves a checkpoint and prints how to resume, without a traceback.

A second Ctrl-C ends the process at once.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lpl_pretrain.config.rundir import RunDir
from tests.support.commands import ctrl_c, logged_losses, lpl, metric_lines, start_lpl, wait_for

LONG = [
    "steps=100000",
    "checkpoint.every_steps=100000",
    "lpl=null",
    "ema.snapshot_every_steps=null",
]
INTERRUPTED = 130


def steps(run):
    return len(logged_losses(run)) if (run / "metrics.jsonl").is_file() else 0


def temporaries(folder):
    return [
        path.name
        for path in folder.rglob("*")
        if path.name.startswith(".") and path.suffix == ".tmp"
    ]


def wait_end(process):
    """Wait for the end of a process: (exit status, lines on stderr)."""
    stderr = process.communicate(timeout=100)[1]
    assert "Traceback" not in stderr, stderr
    return process.returncode, stderr.splitlines()


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_stops_after_the_step_and_resumes(world, ranks):
    """torchrun ends with status 1 after any signal; our plugin suppresses its traceback."""
    run = world / f"ctrl_c_{ranks}"
    settings = [*LONG, *["parallel.strategy=ddp"] * (ranks > 1)]
    process = start_lpl("train", world / "train.yaml", f"run_dir={run}", *settings, ranks=ranks)
    wait_for(process, lambda: steps(run) >= 3)
    ctrl_c(process)
    stderr = process.communicate(timeout=100)[1].splitlines()
    (stopped,) = [line for line in metric_lines(run) if line.get("event") == "stopped"]
    assert stopped["signal"] == "SIGINT" and RunDir(run).complete_checkpoints() == [stopped["step"]]
    (message,) = [line for line in stderr if "stopped after step" in line]
    assert (
        f"SIGINT: stopped after step {stopped['step']} of 100000; the same command goes on "
        "from there: " in message
    )
    assert f"lpl_pretrain train {world / 'train.yaml'} run_dir={run} steps=100000" in message
    if ranks == 1:
        assert process.returncode == INTERRUPTED and message == stderr[-1]
    assert not temporaries(run) and not (run / "live.lease").exists()
    end = stopped["step"] + 1
    lpl("train", world / "train.yaml", f"run_dir={run}", *settings, f"steps={end}", ranks=ranks)
    assert max(logged_losses(run)) == end and [
        line["step"] for line in metric_lines(run) if line.get("event") == "resumed"
    ] == [end - 1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_ctrl_c_ends_training_at_once(world, ranks):
    """Training ends in the middle of a step.  torchrun forwards the second one as SIGTERM."""
    run = world / f"twice_{ranks}"
    settings = [
        *LONG,
        "batch.global_batch_size=1024",
        "batch.micro_batch_size=8",
        *["parallel.strategy=ddp"] * (ranks > 1),
    ]
    process = start_lpl("train", world / "train.yaml", f"run_dir={run}", *settings, ranks=ranks)
    # once the first step is logged, Ctrl-C waits for the end of a step
    wait_for(process, lambda: steps(run) >= 2)
    ctrl_c(process)
    line = process.stderr.readline()
    while "a second Ctrl-C ends the process at once" not in line:
        assert line, "the first Ctrl-C was not answered"
        line = process.stderr.readline()
    ctrl_c(process)
    rest = process.communicate(timeout=100)[1]
    assert (
        process.returncode == (INTERRUPTED if ranks == 1 else 1)
        and "interrupted: nothing was saved now" in rest
    )
    assert not RunDir(run).complete_checkpoints() and not [
        line for line in metric_lines(run) if "event" in line
    ]


@pytest.mark.parametrize("until", ["live.lease", "logs/samples_rank_00000.jsonl"])
def test_training_ends_at_once_before_the_first_step(world, until):
    """No folder is left, unless the first step was about to start."""
    run = world / f"unbegun_{until.partition('/')[0]}"
    settings = [*LONG, *["parallel.compile=true"] * until.startswith("logs")]
    process = start_lpl("train", world / "train.yaml", f"run_dir={run}", *settings)
    wait_for(process, (run / until).exists)
    ctrl_c(process)
    status, stderr = wait_end(process)
    assert status == INTERRUPTED and stderr[-1].startswith(
        "interrupted: nothing was saved now; the same command goes on: "
    )
    assert not RunDir(run).complete_checkpoints() and not (run / "live.lease").exists()
    assert until.startswith("logs") or not run.exists()


def test_encoding_resumes_with_the_same_bytes(world):
    """The shards equal those of an uninterrupted encode."""
    out = world / "latents_interrupted"
    command = ["encode", world / "encode.yaml", f"output={out}", "batch_size=1"]
    process = start_lpl(*command)
    wait_for(process, lambda: list(out.glob(".encode/part-*.json")))
    ctrl_c(process)
    status, stderr = wait_end(process)
    assert status == INTERRUPTED and stderr[-1].startswith(
        "interrupted: finished parts are kept; the same command goes on: "
    )
    assert f"lpl_pretrain encode {world / 'encode.yaml'} output={out}" in stderr[-1]
    assert not temporaries(out) and not (out / "index.json").exists()
    lpl(*command)
    again = world / "latents_again"
    lpl("encode", world / "encode.yaml", f"output={again}", "batch_size=1")
    assert [(path.name, path.read_bytes()) for path in sorted(out.glob("*.tar"))] == [
        (path.name, path.read_bytes()) for path in sorted(again.glob("*.tar"))
    ]


def test_evaluation_keeps_its_features(world):
    run = world / "scored"
    shutil.copytree(world / "whole", run, ignore=shutil.ignore_patterns("evaluations"))
    command = ["evaluate", run, world / "quick.yaml", "images=48", "batch_size=2"]
    process = start_lpl(*command)
    wait_for(process, lambda: list(run.glob("evaluations/*/*.partial/*/*.safetensors")))
    ctrl_c(process)
    status, stderr = wait_end(process)
    assert status == INTERRUPTED and stderr[-1].startswith(
        "interrupted: features that were made are kept; the same command goes on"
    )
    assert not list(run.glob("evaluations/*/*.lease")) and not temporaries(run)
    kept = set(run.glob("evaluations/*/*.partial/*/*.safetensors"))
    assert kept and not list(run.glob("evaluations/*/quick.json"))


@pytest.mark.parametrize("command", ["sample", "report", "doctor"])
def test_other_commands_end_with_one_line(world, command):
    arguments = {
        "sample": [
            "sample",
            world / "whole",
            "--images",
            64,
            "--sampler-steps",
            2000,
            "--output",
            world / "never.png",
        ],
        "report": ["report", world / "whole", "--output", world / "never.html"],
        "doctor": ["doctor"],
    }[command]
    process = start_lpl(*arguments, cold=True)
    threads = Path(f"/proc/{process.pid}/task")
    wait_for(process, lambda: len(list(threads.iterdir())) > 1)  # the thread that reads signals
    ctrl_c(process)
    stderr = process.communicate(timeout=100)[1]
    assert (
        process.returncode == INTERRUPTED
        and stderr.splitlines()[-1] == "interrupted"
        and "Traceback" not in stderr
    )
    assert not (world / "never.png").exists() and not (world / "never.html").exists()
