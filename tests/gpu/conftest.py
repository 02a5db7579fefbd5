"""On one NVIDIA GPU: `LPL_TEST_GPU=1 python -m pytest tests/gpu`.  What it must do is what the CPU does."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lpl_pretrain.runtime.dist import start
from lpl_pretrain.runtime.world import World

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if os.environ.get("LPL_TEST_GPU") and torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="wants an NVIDIA GPU: LPL_TEST_GPU=1 python -m pytest tests/gpu")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def gpu():
    """The device, with a group of one NCCL rank."""
    torch.set_float32_matmul_precision("highest")
    device = start(World(), group=True)
    assert dist.get_backend() == "nccl"
    yield device
    dist.destroy_process_group()
