"""The process of each task: signals, hangs, changed code, working directory."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from launch.batch_script import batch_script
from launch.job import JobSpec
from launch.job_folder import HUNG, JobFolder
from launch.signals import FORWARDED, SignalForwarder
from launch.worker import Worker
from lpl_pretrain.config.cluster import ClusterProfile
from lpl_pretrain.errors import BAD_INPUT, ConfigError
from lpl_pretrain.runtime.source_hash import source_hash


@pytest.fixture
def allocated(monkeypatch):
    """Make this process the only task of job 7, and restore its signal handlers afterwards."""
    for name, value in {
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    handlers = {number: signal.getsignal(number) for number in FORWARDED}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("policy", ["warn", "refuse"])
def test_changed_code_is_reported_or_refused(tmp_path, policy, allocated, capsys):
    """The worker was pickled with other code, as before an upgrade and a requeue."""
    task = Worker(["--version"], str(tmp_path), [], "0" * 64, policy)
    if policy == "refuse":
        with pytest.raises(SystemExit) as ended:
            task()
        assert ended.value.code == BAD_INPUT
    else:
        assert task() == 0
    assert (
        "the code has changed since this job was submitted (000000000000 then, "
        in capsys.readouterr().out
    )
    (rank_exit,) = JobFolder(tmp_path).exits("7", 0)
    assert (
        rank_exit["status"] == (BAD_INPUT if policy == "refuse" else 0) and not rank_exit["stopped"]
    )


def test_early_signal_is_forwarded_to_the_child(tmp_path, allocated, monkeypatch):
    """The signal arrives before the child starts; a child that dies of it has succeeded."""
    task = Worker([], str(tmp_path), ["sh", "-c", "sleep 30"], source_hash())
    monkeypatch.setattr(
        SignalForwarder,
        "forward_to",
        lambda self, child, real=SignalForwarder.forward_to: (
            os.kill(os.getpid(), signal.SIGUSR2),
            real(self, child),
        ),
    )
    assert task() == 0
    (rank_exit,) = JobFolder(tmp_path).exits("7", 0)
    assert rank_exit["status"] == 0 and rank_exit["stopped"]


@pytest.mark.parametrize(
    ("child", "kill_on_hang", "status"),
    [
        ("echo stacks > $LPL_STACKS_FILE; exec sleep 30", True, HUNG),
        ("echo stacks > $LPL_STACKS_FILE; sleep 2", False, 0),
        ("echo stacks > $LPL_STACKS_FILE; sleep 0.5", True, 0),
        (": > $LPL_STACKS_FILE; sleep 2; exit 3", True, 3),
    ],
    ids=["hangs", "hangs and is not killed", "recovers and succeeds", "fails"],
)
def test_hung_child_is_killed(tmp_path, allocated, monkeypatch, child, kill_on_hang, status):
    """Rank 3 was in training too and dumped no stacks, so it is named as silent."""
    monkeypatch.setattr("launch.worker.STACKS_POLL_S", 0.1)
    monkeypatch.setattr("launch.worker.GRACE_S", 1.0)
    folder = JobFolder(tmp_path)
    folder.stacks("7", 0, 3, "node-2.site").touch()
    task = Worker([], str(tmp_path), ["sh", "-c", child], source_hash(), kill_on_hang=kill_on_hang)
    if status:
        with pytest.raises(SystemExit) as ended:
            task()
        assert ended.value.code == status
    else:
        assert task() == 0
    (rank_exit,) = folder.exits("7", 0)
    assert rank_exit["status"] == status
    assert rank_exit.get("silent_ranks") == (
        [{"rank": 3, "host": "node-2.site"}] if status == HUNG else None
    )
    folder.remove_empty_stacks("7")
    assert len(list(tmp_path.glob("stacks_7_0_rank_00000_*.txt"))) == (
        status != 3
    ) and not folder.silent_ranks("7", 0)


def spec(folder, **options):
    return JobSpec("train", ["train", "x.yaml"], Path(folder), 1, **options)


def test_job_runs_in_the_folder_of_its_submission(tmp_path, monkeypatch):
    """The worker fails where its node does not see that folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="removes backslashes"):
        batch_script(spec(tmp_path / "run", cwd="/a\\b"), ClusterProfile())
    wanted = spec(tmp_path / "run")
    assert f"#SBATCH --chdir={tmp_path}" in batch_script(wanted, ClusterProfile()).splitlines()
    for name, value in {"JOB_ID": "7", "PROCID": "0", "LOCALID": "0", "NTASKS": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "run").mkdir()
    there = Worker(
        [], str(tmp_path / "run"), ["sh", "-c", "pwd > where"], source_hash(), cwd=str(tmp_path)
    )
    assert there() == 0 and (tmp_path / "where").read_text().strip() == str(tmp_path)
    gone = Worker(
        [], str(tmp_path / "run"), ["touch", "begun"], source_hash(), cwd=str(tmp_path / "gone")
    )
    with pytest.raises(SystemExit) as ended:
        gone()
    assert ended.value.code == BAD_INPUT and not list(tmp_path.rglob("begun"))
