"""Reports of a rank about its node; defects are reported, not raised."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace

import pytest
import torch

from lpl_pretrain.config.data_mixture import read_data
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.preflight import node_report
from lpl_pretrain.preflight.node_report import (
    inspect_node,
    probe_folder,
    probe_shard,
    required_checkpoint_gib,
    wrong_product,
)
from lpl_pretrain.runtime.world import World
from tests.support.configs import train_config
from tests.support.latents import tiny_dataset
from tests.support.tiny_run import make_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    latents, _ = tiny_dataset(tmp_path_factory.mktemp("data"), 8)
    return latents


def test_report_of_a_fit_node(data, tmp_path):
    report = inspect_node(train_config(), RunDir(tmp_path / "run"), World(), read_data(data))
    problems = (
        report.refusal,
        report.run_dir_problem,
        report.shard_problem,
        report.no_device,
        report.device_problem,
    )
    assert (
        problems == (None,) * 5
        and report.free_gib > report.required_gib > 0
        and report.shard.startswith(data)
    )
    assert not list(tmp_path.iterdir()), "the probe file is removed, and no folder is created"


def test_missing_or_truncated_shard_is_reported(data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "latents")
    (shard,) = folder.glob("*.tar")
    found = read_data(str(folder))
    assert probe_shard(found, 5) == (str(shard), None)
    os.truncate(shard, 0)
    assert "shorter than a header" in probe_shard(found, 0)[1]
    shard.unlink()
    assert "FileNotFoundError" in probe_shard(found, 0)[1]
    assert "ValueError" in probe_shard(replace(found, paths=["nowhere://x"]), 0)[1], (
        "an error of a driver"
    )


def test_run_folder_that_cannot_be_created_is_reported(tmp_path):
    (tmp_path / "file").touch()
    free, problem = probe_folder(RunDir(tmp_path / "file"))
    assert free is None and "NotADirectoryError" in problem


def test_full_disk_is_reported_as_no_free_space(tmp_path, monkeypatch):
    """The folder has no problem: space may become free."""

    def full(**options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(node_report.tempfile, "TemporaryFile", full)
    assert probe_folder(RunDir(tmp_path)) == (0.0, None)


def test_device_that_multiplies_wrongly_is_reported(monkeypatch):
    assert wrong_product(torch.device("cpu")) is None
    right = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor,
        "__matmul__",
        lambda a, b: right(a, b) + (a.is_floating_point() and torch.eye(node_report.MATRIX_SIZE)),
    )
    assert (
        wrong_product(torch.device("cpu"))
        == f"{node_report.MATRIX_SIZE} wrong numbers in a product of matrices"
    )


def test_required_space_is_the_size_of_the_checkpoints_to_come(tmp_path):
    """The test run's checkpoints hold parameters and their average; AdamW's state is as large."""
    made = make_run(tmp_path, "flow", "rectified_flow")
    config, data = (
        train_config(steps=600, checkpoint__keep_last=1),
        read_data(str(tmp_path / "data")),
    )
    size = (
        2
        * sum(file.stat().st_size for file in made.run_dir.checkpoint(6).glob("*.safetensors"))
        / 2**30
    )
    wanted = required_checkpoint_gib(config, made.run_dir, data)
    assert 0.8 * size < wanted < size, "two exist, and one is written before the oldest is removed"
    assert required_checkpoint_gib(config, RunDir(tmp_path / "new"), data) == pytest.approx(
        2 * wanted
    )
    assert required_checkpoint_gib(train_config(steps=6), made.run_dir, data) == 0, "it is complete"
    assert required_checkpoint_gib(
        train_config(steps=600, ema__sigma_rel=[0.1]), made.run_dir, data
    ) == pytest.approx(5 / 4 * 2 * wanted)
