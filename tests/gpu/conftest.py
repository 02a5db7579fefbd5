"""Comparison with the CPU on one NVIDIA GPU: `LPL_TEST_GPU=1 python -m pytest tests/gpu`."""

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if os.environ.get("LPL_TEST_GPU") and torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU: LPL_TEST_GPU=1 python -m pytest tests/gpu")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(skip)
