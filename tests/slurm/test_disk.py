"""The disk of a run is full, and then it is not: the run goes on from its last checkpoint; and sacct calls every job FAILED."""

from __future__ import annotations

import contextlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.slurm import test_training
from tests.slurm.conftest import running
from tests.slurm.test_network import ends_as, restarts
from tests.slurm.test_training import STRATEGIES, Job
from tests.support.commands import lpl

folder = test_training.folder
STEPS = 100
LIAR = "#!/bin/sh\necho 'JobID|State|NodeList'\nexec squeue -a -h -r -t all -o '%i|FAILED|%N'\n"


@pytest.fixture
def disk(folder):
    """A small one, where a run is to be."""
    disk = folder / "full"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "small", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def cluster(disk):
    with running() as cluster:
        (cluster.folder / "bin" / "sacct").write_text(LIAR)
        yield cluster


@contextlib.contextmanager
def filled(disk, room=0):
    """But for so many bytes."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(ballast, ballast.stat().st_size - room)
    yield
    ballast.unlink()


def test_goes_on_when_there_is_space_again(cluster, folder, disk):
    """First too little for a checkpoint, then none for a line of a log, or for telling how an attempt has ended."""
    own = [*STRATEGIES["zero2"], f"steps={STEPS}"]
    job = Job(cluster, folder, disk.name, *own)
    job.wait(lambda: 22 in job.steps(), "step 22")
    with filled(disk, room=300_000):
        job.wait(lambda: job.folder.read_attempts(), "the end of an attempt")
        assert [path.name for path in (disk / "checkpoints").iterdir()] == ["step_00000020"]
    job.wait(lambda: job.resumes(), "resumed")
    job.wait((disk / "checkpoints" / "step_00000040").exists, "another checkpoint")
    with filled(disk), ThreadPoolExecutor() as pool:  # nothing else computes
        alone = pool.submit(lpl, "train", folder / "train.yaml", f"run_dir={folder}/alone", *own, ranks=4)
        job.wait(lambda: restarts(job) >= 3, "the end of an attempt that could not even begin")
        alone.result()
    job.wait(lambda: cluster.job_state(job.id) in ("COMPLETED", ""), "the end")
    ends_as(job, folder / "alone", STEPS)
    assert [line["step"] for line in job.resumes()][:2] == [20, 40]
    first, *_, last = job.folder.read_attempts()
    assert (first["status"], first["reason"], first["requeued"]) == (1, "failed with status 1, 1 of 3 in a row", True)
    assert last["reason"] == "done"
    assert "step_00000040" in (told := job.launch("logs", job.run).stdout) and "SaveError" in told and "No space left" in told
