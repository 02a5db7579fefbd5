"""A node that has lost the data is named and left out, and training completes on two others: on the
real scheduler.
"""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.slurm.job import STRATEGIES, Job

SMALL = [*STRATEGIES["fsdp2"], "steps=20", "lpl=null"]
ONE_EACH = ["processes_per_node=1", "gpus_per_node=1"]


@pytest.fixture
def lost(cluster, folder):
    """On node2 the latents' folder is empty, as when a file system was not mounted."""
    inside = ["nsenter", "--mount", "--target", str(cluster.machines["node2"].init)]
    subprocess.run([*inside, "mount", "-t", "tmpfs", "none", folder / "latents"], check=True)
    yield
    subprocess.run([*inside, "umount", folder / "latents"], check=True)


def run(cluster, folder, name, *overrides):
    """The job, which has ended."""
    job = Job(cluster, folder, name, *SMALL, *overrides, changes=ONE_EACH)
    job.wait(lambda: cluster.job_state(job.id) in ("COMPLETED", "FAILED"), "the end")
    return job


def test_goes_on_without_a_node_that_is_unfit(cluster, folder, lost):
    job = run(cluster, folder, "fit")
    first, last = job.folder.read_attempts()
    assert (
        first["reason"].startswith("node2 is unfit: input: found DataError: ")
        and "1 of 3 in a row" in first["reason"]
    )
    assert (first["status"], first["host"], first["requeued"]) == (75, "node2", True)
    assert last["reason"] == "done" and last["steps"][1] == 20
    report = json.loads((job.run / "preflight.json").read_text())
    assert {found["host"] for found in report["ranks"]} == {"node1", "node3"} and not report[
        "findings"
    ]
    assert "excluded    node2" in job.launch("status", job.run).stdout, (
        "and `launch resume` reads it there"
    )
    told = job.launch("logs", job.run).stdout
    assert (
        "preflight: node2 (rank 1): input: found DataError" in told and "this node is unfit" in told
    )


def test_has_teeth(cluster, folder, lost):
    """Without a preflight the same node ends the job: its trouble is taken for the input's."""
    job = run(cluster, folder, "unseen", "preflight=null")
    (only,) = job.folder.read_attempts()
    assert (only["status"], only["requeued"]) == (2, False)
