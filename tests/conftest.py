"""Settings of the whole suite: GPUs are hidden except for tests/gpu; order of tests for xdist."""

import os
from pathlib import Path
from typing import Any

import pytest

if not os.environ.get("LPL_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

TESTS = Path(__file__).parent
LONGEST_FOLDERS = ("slurm", "chaos")
"""Folders that start first; all tests of one of them run on one worker and share a cluster."""

MARKERS = {
    "architecture": ["unit"],
    "unit": ["unit"],
    "fuzz": ["fuzz"],
    "integration": ["integration", "slow"],
    "distributed": ["distributed", "slow"],
    "chaos": ["chaos", "slow"],
    "slurm": ["slurm", "slow"],
    "gpu": ["gpu", "slow"],
}
"""Markers of all tests in a folder of tests/ (setup.cfg)."""


def worker_unit(node_id: str) -> str:
    """File, or folder of LONGEST_FOLDERS, whose tests must run together on one xdist worker."""
    file = node_id.partition("::")[0]
    folder = next((part for part in file.split("/") if part in LONGEST_FOLDERS), None)
    return folder or file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the longest folders first; mark tests by folder."""

    def position(item: pytest.Item) -> int:
        unit = worker_unit(item.nodeid)
        return LONGEST_FOLDERS.index(unit) if unit in LONGEST_FOLDERS else len(LONGEST_FOLDERS)

    items.sort(key=position)
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        for marker in MARKERS[folder]:
            item.add_marker(marker)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute tests over xdist workers by `worker_unit` (with --dist loadscope)."""
    from xdist.scheduler import LoadScopeScheduling

    class UnitScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return worker_unit(nodeid)

    return UnitScheduling(config, log)
