from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lpl_pretrain.evaluation.inception import random_weights
from tests.support.tiny_run import TinyRun, make_run


@pytest.fixture
def run(tmp_path: Path) -> TinyRun:
    return make_run(tmp_path, prediction="flow", schedule="rectified_flow")


@pytest.fixture
def run_of(tmp_path: Path):
    """A run with another (prediction, schedule)."""
    return lambda prediction, schedule: make_run(tmp_path, prediction, schedule)


@pytest.fixture(scope="session")
def inception_layout() -> dict[str, torch.Tensor]:
    return random_weights()
