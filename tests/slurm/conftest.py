"""One real SLURM cluster for all tests of this folder; skipped only where it cannot be installed or root is not given."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.packages import missing


@contextlib.contextmanager
def running(kind=Cluster):
    """A cluster for as long as it is needed; what is mounted before is seen by its machines."""
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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failed test reports the daemons' logs."""
    report = yield
    if report.failed and (cluster := getattr(item, "funcargs", {}).get("cluster")):
        report.sections.append(("SLURM", cluster.logs()))
    return report
