"""Preflight on a real SLURM cluster: a node without the data is excluded."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.slurm.job import STRATEGIES, Job

SMALL = [*STRATEGIES["fsdp2"], "steps=20", "lpl=null"]
ONE_EACH = ["processes_per_node=1", "gpus_per_node=1"]


@pytest.fixture
def unfit_node(cluster, folder):
    """Make the latents' folder empty on node2, as when a file system is not mounted."""
    inside = ["nsenter", "--mount", "--target", str(cluster.machines["node2"].init)]
    subprocess.run([*inside, "mount", "-t", "tmpfs", "none", folder / "latents"], check=True)
    yield
    subprocess.run([*inside, "umount", folder / "latents"], check=True)


def run(cluster, folder, name, *overrides):
    """Run a job to its end."""
    job = Job(cluster, folder, name, *SMALL, *overrides, changes=ONE_EACH)
    job.wait(lambda: cluster.job_state(job.id) in ("COMPLETED", "FAILED"), "the end")
    return job


def test_job_is_requeued_without_the_unfit_node(cluster, folder, unfit_node):
    job = run(cluster, folder, "fit")
    first, last = job.folder.read_attempts()
    assert (
        first["reason"].startswith("node2 is unfit: input: found DataError: ")
        and "1 of 3 in a row" in first["reason"]
    )
    assert (first["status"], first["host"], first["requeued"]) == (75, "node2", True)
    assert last["reason"] == "done" and last["steps"][1] == 20
    report = json.loads((job.run / "preflight.json").read_text())
    assert {rank["host"] for rank in report["ranks"]} == {"node1", "node3"} and not report[
        "findings"
    ]
    assert "excluded    node2" in job.launch("status", job.run).stdout, (
        "from the record that `launch resume` reads"
    )
    logs = job.launch("logs", job.run).stdout
    assert (
        "preflight: node2 (rank 1): input: found DataError" in logs and "this node is unfit" in logs
    )


def test_without_preflight_the_unfit_node_ends_the_job(cluster, folder, unfit_node):
    """The missing data count as bad input of the run."""
    job = run(cluster, folder, "no preflight", "preflight=null")
    (only,) = job.folder.read_attempts()
    assert (only["status"], only["requeued"]) == (2, False)
