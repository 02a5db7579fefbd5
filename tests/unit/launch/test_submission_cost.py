"""Cost of a submission on a shared login node: imports and hashes are counted, not seconds."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.sweep import plan_runs
from lpl_pretrain.config import check
from lpl_pretrain.config.hashing import WEIGHTS, autoencoder_identity
from lpl_pretrain.config.load import resolve_path
from tests.support.commands import ROOT
from tests.support.configs import dataset_index, train_config

HEAVY = {
    "torch",
    "numpy",
    "PIL",
    "deepspeed",
    "diffusers",
    "transformers",
    "timm",
    "matplotlib",
    "jinja2",
    "fsspec",
    "wandb",
}


def imported(*command, **options) -> set[str]:
    """Packages that a Python command imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        **options,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {
        name.partition(".")[0]
        for name in re.findall(r"^import time:.*\|\s+([\w.]+)$", done.stderr, re.MULTILINE)
    }


@pytest.fixture
def config(tmp_path):
    identity = autoencoder_identity(resolve_path("asset:autoencoder_emoji"))
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "index.json").write_text(
        dataset_index(identity=identity).model_dump_json()
    )
    settings = train_config(
        data__folder=str(tmp_path / "latents"),
        parallel__strategy="fsdp2",
        batch__global_batch_size=512,
    )
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 4711\n")
    (tmp_path / "sbatch").chmod(0o755)
    return tmp_path / "train.yaml"


def test_submission_imports_no_heavy_package(config, tmp_path):
    arguments = [
        "train",
        config,
        f"run_dir={tmp_path}/run",
        "--cluster",
        ROOT / "configs/cluster/slurm.yaml",
        "--nodes",
        64,
    ]
    packages = imported(
        "-m",
        "launch",
        *arguments,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        umask=0,
    )
    assert {"launch", "submitit", "pydantic"} <= packages and (
        tmp_path / "run" / "launch" / "job.json"
    ).is_file()
    assert not packages & HEAVY
    written = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    assert len(written) >= 5 and not [
        path for path in written if path.stat().st_mode & stat.S_IWOTH
    ], "with any umask"


def test_heavy_imports_are_detected():
    assert {"matplotlib", "numpy"} <= imported("-c", "import lpl_pretrain.report.charts") & HEAVY


@pytest.mark.parametrize("broken", [False, True])
def test_weights_are_hashed_once_for_a_sweep(config, monkeypatch, broken):
    """Hashing an autoencoder of hundreds of MB takes longer than the rest of a submission."""
    opened, plain = [], Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, *given, **named: opened.append(self.name) or plain(self, *given, **named),
    )
    autoencoder_identity.cache_clear()
    if broken:
        monkeypatch.setattr(check, "autoencoder_identity", autoencoder_identity.__wrapped__)
    assert len(plan_runs(str(config), [], ["optimizer.lr=1e-3,2e-3,3e-3"], 8)) == 3
    assert opened.count(WEIGHTS) == (3 if broken else 1)
