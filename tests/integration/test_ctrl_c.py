"""Ctrl-C on real processes: a checkpoint and one line that says how to go on; a second one leaves
at once; never a traceback.
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


def end_of(process):
    """(status, lines on stderr)."""
    said = process.communicate(timeout=100)[1]
    assert "Traceback" not in said, said
    return process.returncode, said.splitlines()


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_stops_after_the_step_and_goes_on(world, ranks):
    """torchrun ends with the status 1 after any signal; that it also prints a traceback of its own
    is prevented by a plugin.
    """
    run = world / f"ctrl_c_{ranks}"
    settings = [*LONG, *["parallel.strategy=ddp"] * (ranks > 1)]
    process = start_lpl("train", world / "train.yaml", f"run_dir={run}", *settings, ranks=ranks)
    wait_for(process, lambda: steps(run) >= 3)
    ctrl_c(process)
    said = process.communicate(timeout=100)[1].splitlines()
    (stopped,) = [line for line in metric_lines(run) if line.get("event") == "stopped"]
    assert stopped["signal"] == "SIGINT" and RunDir(run).complete_checkpoints() == [stopped["step"]]
    (told,) = [line for line in said if "stopped after step" in line]
    assert (
        f"SIGINT: stopped after step {stopped['step']} of 100000; the same command goes on "
        "from there: " in told
    )
    assert f"lpl_pretrain train {world / 'train.yaml'} run_dir={run} steps=100000" in told
    if ranks == 1:
        assert process.returncode == INTERRUPTED and told == said[-1]
    assert not temporaries(run) and not (run / "live.lease").exists()
    end = stopped["step"] + 1
    lpl("train", world / "train.yaml", f"run_dir={run}", *settings, f"steps={end}", ranks=ranks)
    assert max(logged_losses(run)) == end and [
        line["step"] for line in metric_lines(run) if line.get("event") == "resumed"
    ] == [end - 1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_one_leaves_at_once(world, ranks):
    """In the middle of a step, and nothing waits for its end.  torchrun passes the second one on as
    SIGTERM.
    """
    run = world / f"twice_{ranks}"
    settings = [
        *LONG,
        "batch.global_batch_size=1024",
        "batch.micro_batch_size=8",
        *["parallel.strategy=ddp"] * (ranks > 1),
    ]
    process = start_lpl("train", world / "train.yaml", f"run_dir={run}", *settings, ranks=ranks)
    wait_for(
        process, lambda: steps(run) >= 2
    )  # Ctrl-C waits for a step from behind the first line on
    ctrl_c(process)
    said = process.stderr.readline()
    while "a second Ctrl-C ends the process at once" not in said:
        assert said, "the first one was not answered"
        said = process.stderr.readline()
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
def test_before_the_first_step_training_ends(world, until):
    """And leaves no folder, unless it was about to make a step."""
    run = world / f"unbegun_{until.partition('/')[0]}"
    settings = [*LONG, *["parallel.compile=true"] * until.startswith("logs")]
    process = start_lpl("train", world / "train.yaml", f"run_dir={run}", *settings)
    wait_for(process, (run / until).exists)
    ctrl_c(process)
    status, said = end_of(process)
    assert status == INTERRUPTED and said[-1].startswith(
        "interrupted: nothing was saved now; the same command goes on: "
    )
    assert not RunDir(run).complete_checkpoints() and not (run / "live.lease").exists()
    assert until.startswith("logs") or not run.exists()


def test_encoding_goes_on_with_the_same_bytes(world):
    """As `whole` in the latents that another command wrote."""
    out = world / "latents_interrupted"
    command = ["encode", world / "encode.yaml", f"output={out}", "batch_size=1"]
    process = start_lpl(*command)
    wait_for(process, lambda: list(out.glob(".encode/part-*.json")))
    ctrl_c(process)
    status, said = end_of(process)
    assert status == INTERRUPTED and said[-1].startswith(
        "interrupted: finished parts are kept; the same command goes on: "
    )
    assert f"lpl_pretrain encode {world / 'encode.yaml'} output={out}" in said[-1]
    assert not temporaries(out) and not (out / "index.json").exists()
    lpl(*command)
    again = world / "latents_again"
    lpl("encode", world / "encode.yaml", f"output={again}", "batch_size=1")
    assert [(path.name, path.read_bytes()) for path in sorted(out.glob("*.tar"))] == [
        (path.name, path.read_bytes()) for path in sorted(again.glob("*.tar"))
    ]


def test_evaluation_goes_on(world):
    run = world / "scored"
    shutil.copytree(world / "whole", run, ignore=shutil.ignore_patterns("evaluations"))
    command = ["evaluate", run, world / "quick.yaml", "images=48", "batch_size=2"]
    process = start_lpl(*command)
    wait_for(process, lambda: list(run.glob("evaluations/*/*.partial/*/*.safetensors")))
    ctrl_c(process)
    status, said = end_of(process)
    assert status == INTERRUPTED and said[-1].startswith(
        "interrupted: features that were made are kept; the same command goes on"
    )
    assert not list(run.glob("evaluations/*/*.lease")) and not temporaries(run)
    kept = set(run.glob("evaluations/*/*.partial/*/*.safetensors"))
    assert kept and not list(run.glob("evaluations/*/quick.json"))


@pytest.mark.parametrize("command", ["sample", "report", "doctor"])
def test_other_commands_end_with_a_line(world, command):
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
    wait_for(
        process, lambda: len(list(Path(f"/proc/{process.pid}/task").iterdir())) > 1
    )  # the thread that reads signals
    ctrl_c(process)
    said = process.communicate(timeout=100)[1]
    assert (
        process.returncode == INTERRUPTED
        and said.splitlines()[-1] == "interrupted"
        and "Traceback" not in said
    )
    assert not (world / "never.png").exists() and not (world / "never.html").exists()
