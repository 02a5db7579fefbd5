"""The suite proves everything on the CPU, also on a machine with GPUs: there they are hidden, unless tests/gpu is what runs."""

import os

import pytest

if not os.environ.get("LPL_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

FIRST = ("slurm", "chaos")
"""Folders that take longest and wait most: each is one group, which runs beside the other tests."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group tests for pytest-xdist: by file, since a file's fixtures are shared, and all of SLURM's on one cluster."""

    def group(item: pytest.Item) -> str:
        folder = item.path.relative_to(item.config.rootpath).parts[1]
        return folder if folder in FIRST else str(item.path)

    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
    items.sort(key=lambda item: FIRST.index(group(item)) if group(item) in FIRST else len(FIRST))
