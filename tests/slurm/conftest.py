"""One real SLURM cluster for all tests of this folder; skipped only where it cannot be installed or
root is not given.
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
    """A cluster for as long as it is needed."""
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
    """Three nodes with two GPUs each, as good as empty: a test cancels the jobs that it submits."""
    with running() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Latents, `train.yaml`, and the profile `cluster.yaml`."""
    folder = tmp_path_factory.mktemp("slurm training")  # a name with a space, as users have them
    prepare(folder)
    return folder


@pytest.fixture(autouse=True)
def no_job_is_left(request):
    """By a test that fails, for the next one to wait for."""
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
