"""Imports before the fork what DeepSpeed would import in every rank: 0.4 s a launch, not 14 s."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest

pytest.importorskip("deepspeed")
import torch._dynamo
import torch._inductor.compile_fx  # noqa: F401
