"""One real SLURM cluster for all tests of this folder, which are skipped without root, or where it
cannot be installed.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.job import prepare
from tests.slurm.packages import missing


@contextlib.contextmanager
def running(kind=Cluster):
    """Start a cluster, and stop it at the end."""
    if reason := missing():
        pytest.skip(reason)
    # not pytest's folder: the name of munge's socket must fit into 107 characters
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        cluster = kind(Path(folder))
        cluster.up()
        yield cluster
        cluster.down()


@pytest.fixture(scope="session")
def cluster():
    """Three nodes with two GPUs each; a test cancels the jobs that it submits."""
    with running() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with latents, `train.yaml`, and the profile `cluster.yaml`."""
    folder = tmp_path_factory.mktemp("slurm training")  # a name with a space, as users have them
    prepare(folder)
    return folder


@pytest.fixture(autouse=True)
def cancel_jobs(request):
    """Cancel the jobs that a failed test leaves, so that the next test need not wait for them."""
    yield
    cluster = request.node.funcargs.get("cluster")
    if cluster and cluster.machines:
        cluster.run("scancel", "--user=root", check=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failed test reports the daemons' logs."""
    report = yield
    if report.failed and (cluster := getattr(item, "funcargs", {}).get("cluster")):
        report.sections.append(("SLURM", cluster.logs()))
    return report
