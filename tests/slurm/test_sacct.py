"""Jobs with accounting, and without sacct.  test_recovery.py has a sacct that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.accounting import AccountedCluster
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import running
from tests.slurm.faults import crash_node_of_rank_0
from tests.slurm.job import STRATEGIES, Job

ENDLESS = [*STRATEGIES["fsdp2"], "steps=100000", "lpl=null"]


class WithoutSacct(Cluster):
    """A cluster where the programs on PATH do not include sacct."""

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
def cluster(request):
    with running(request.param) as cluster:
        yield cluster


def check_status_and_cancel(job):
    assert f"job         {job.id}: RUNNING" in job.launch("status", job.run).stdout
    assert f"its job {job.id} is RUNNING" in job.launch("resume", job.run).stderr
    job.launch("cancel", job.run)
    job.wait(lambda: job.cluster.job_state(job.id) == "FAILED", "the end of a cancelled job")
    assert (
        job.folder.read_attempts()[-1]["reason"] == "cancelled"
        and "stopped after step" in job.launch("logs", job.run).stdout
    )
    assert "cancelled" in job.launch("status", job.run).stdout


@pytest.mark.parametrize("cluster", [WithoutSacct], indirect=True)
def test_launch_without_sacct(cluster, folder):
    assert cluster.run("sh", "-c", "command -v squeue").stdout
    assert not cluster.run("sh", "-c", "command -v sacct", check=False).stdout
    job = Job(cluster, folder, "no sacct", *ENDLESS)
    job.wait_steps(10)
    check_status_and_cancel(job)


@pytest.mark.parametrize("cluster", [AccountedCluster], indirect=True)
def test_launch_with_accounts(cluster, folder):
    """sacct still reports the node failure of an attempt while the requeued job runs; SLURM refuses
    unknown accounts.
    """
    refused = Job.submit(cluster, folder, "unknown account", *ENDLESS, changes=["account=unknown"])
    assert (
        refused.returncode == 2
        and "Invalid account or account/partition combination" in refused.stderr
    )
    assert (
        "Invalid qos"
        in Job.submit(
            cluster, folder, "in a hurry", *ENDLESS, changes=["account=lab", "qos=now"]
        ).stderr
    )
    job = Job(cluster, folder, "accounted", *ENDLESS, changes=["account=lab", "qos=urgent"])
    job.wait_steps(25)  # a checkpoint
    job.resumes_after(crash_node_of_rank_0)

    def accounted():
        columns = ["-X", "-n", "-P", "-o", "State,Account,QOS,AllocTRES"]
        return cluster.run("sacct", "--duplicates", *columns, "-j", job.id).stdout.splitlines()

    job.wait(
        lambda: len(accounted()) == 2 and accounted()[1].startswith("RUNNING"),
        "the second attempt in the accounts",
    )
    first, second = accounted()
    assert first.startswith("NODE_FAIL|lab|urgent|") and "gres/gpu=4" in second
    check_status_and_cancel(job)
    job.wait(lambda: accounted()[1].startswith("FAILED"), "the end in the accounts")
