"""Jobs are launched, watched and cancelled where there is no sacct; that one which lies does no harm: test_disk.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm import test_training
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import running
from tests.slurm.test_training import STRATEGIES, Job

folder = test_training.folder


class WithoutSacct(Cluster):
    """All programs of the system but one."""

    @property
    def env(self):
        programs = self.folder / "programs"
        if not programs.exists():
            programs.mkdir()
            for program in (*Path("/usr/sbin").iterdir(), *Path("/usr/bin").iterdir()):
                if program.name != "sacct" and not (programs / program.name).exists():
                    (programs / program.name).symlink_to(program)
        return {**super().env, "PATH": str(programs)}


@pytest.fixture
def cluster():
    with running(WithoutSacct) as cluster:
        yield cluster


def test_launch_without_sacct(cluster, folder):
    assert (
        cluster.run("sh", "-c", "command -v squeue").stdout and not cluster.run("sh", "-c", "command -v sacct", check=False).stdout
    )
    job = Job(cluster, folder, "no sacct", *STRATEGIES["fsdp2"], "steps=100000", "lpl=null")
    job.wait_steps(10)
    assert f"job         {job.id}: RUNNING" in job.launch("status", job.run).stdout
    assert f"its job {job.id} is RUNNING" in job.launch("resume", job.run).stderr
    job.launch("cancel", job.run)
    job.wait(lambda: cluster.job_state(job.id) == "FAILED", "the end of a cancelled job")
    assert job.folder.read_attempts()[-1]["reason"] == "cancelled" and "stopped after step" in job.launch("logs", job.run).stdout
    assert "cancelled" in job.launch("status", job.run).stdout
