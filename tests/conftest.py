"""The suite proves everything on the CPU, also on a machine with GPUs: there they are hidden,
unless tests/gpu is what runs.
"""

import os
from typing import Any

import pytest

if not os.environ.get("LPL_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

FIRST = ("slurm", "chaos")
"""Folders that take longest and wait most: the tests of each stay on one worker, and start first.
"""


def folder_or_file(node_id: str) -> str:
    """Tests of one such unit run on one worker: a file's share fixtures, all of SLURM's one
    cluster.
    """
    file = node_id.partition("::")[0]
    folder = next((part for part in file.split("/") if part in FIRST), None)
    return folder or file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        unit = folder_or_file(item.nodeid)
        return FIRST.index(unit) if unit in FIRST else len(FIRST)

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For --dist loadscope."""
    from xdist.scheduler import LoadScopeScheduling

    class LoadUnits(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return folder_or_file(nodeid)

    return LoadUnits(config, log)
