"""`launch sample` passes its options to the job, and refuses what the job would refuse."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from lpl_pretrain.config.load import dump
from lpl_pretrain.config.rundir import RunDir
from tests.support.commands import ROOT
from tests.support.configs import train_config


@pytest.fixture
def run(tmp_path):
    """Run that predicts flow, with an empty checkpoint."""
    run_dir = RunDir(tmp_path / "a run")
    run_dir.checkpoint(3).mkdir(parents=True)
    (run_dir.checkpoint(3) / "manifest.json").touch()
    run_dir.config.write_text(dump(train_config()))
    (tmp_path / "cluster.yaml").write_text("{processes_per_node: 8, gpus_per_node: 8}")
    return run_dir.path


def launch(run, *options):
    arguments = ["sample", run, "--cluster", run.parent / "cluster.yaml", *options, "--dry-run"]
    return subprocess.run(
        [sys.executable, "-m", "launch", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_given_options_are_passed_to_the_job(run):
    given = [
        "--guidance-interval",
        "0.5",
        "2.0",
        "--prompt",
        "it's a cat",
        "--prompt",
        "dogs",
        "--step",
        "3",
        "--format",
        "png",
    ]
    done = launch(run, *given)
    assert done.returncode == 0, done.stderr
    (command,) = (
        line.partition("lpl_pretrain ")[2]
        for line in done.stdout.splitlines()
        if line.startswith("# python -m lpl_pretrain")
    )
    arrived = shlex.split(command)
    assert arrived[:2] == ["sample", str(run)]
    chunks = {
        ("--guidance-interval", "0.5", "2.0"),
        ("--prompt", "it's a cat", "--prompt", "dogs"),
        ("--step", "3"),
    }
    assert all(" ".join(chunk) in " ".join(arrived) for chunk in chunks) and len(
        arrived
    ) == 2 + len(given)
    assert "kind: euler" in done.stdout and "guidance_interval:\n- 0.5\n- 2.0" in done.stdout


def test_job_has_one_process_and_one_gpu(run):
    lines = launch(run).stdout.splitlines()
    for wanted in ("nodes=1", "ntasks-per-node=1", "gpus-per-node=1", "job-name=a_run-sample"):
        assert f"#SBATCH --{wanted}" in lines, wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "0"], "--images=0: at least 1"),
        (["--sampler", "ddim"], "ddim"),
        (["--sampler", "magic"], "magic"),
        (["--step", "7"], "not a complete checkpoint; complete steps: 3"),
        (["--text-encoder", "clip"], "wanted NAME=FOLDER"),
        (["--nodes", "2"], "No such option"),
    ],
)
def test_invalid_options_are_refused_before_submission(run, options, message):
    done = launch(run, *options)
    assert done.returncode == 2 and message in done.stderr


def test_folder_without_a_run_is_refused(tmp_path, run):
    (run / "config.yaml").unlink()
    assert "not a run directory" in launch(run).stderr
