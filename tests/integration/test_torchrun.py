"""Errors under torchrun: an input error is printed once and last, without a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import ROOT

PLUGIN = "[torchrun.handlers]\nlpl_pretrain = lpl_pretrain.runtime.torchrun:plugin\n"


@pytest.fixture
def torchrun(tmp_path):
    """Function that runs torchrun on two ranks, with our plugin installed or not."""

    def run(*arguments, plugin=True, **variables):
        # comes before the installed one on the path
        dist_info = tmp_path / f"plugin_{plugin}" / "lpl_pretrain-0.1.0.dist-info"
        dist_info.mkdir(parents=True, exist_ok=True)
        (dist_info / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: lpl-pretrain\nVersion: 0.1.0\n"
        )
        (dist_info / "entry_points.txt").write_text(PLUGIN if plugin else "")
        path = f"{dist_info.parent}{os.pathsep}{ROOT}"
        return subprocess.run(
            [
                Path(sys.executable).parent / "torchrun",
                "--nproc-per-node",
                "2",
                *map(str, arguments),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=200,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables},
        )

    return run


def test_the_plugin_is_declared():
    declared = (ROOT / "setup.cfg").read_text()
    assert (
        "torchrun.handlers" in declared
        and "lpl_pretrain = lpl_pretrain.runtime.torchrun:plugin" in declared
    )


@pytest.mark.parametrize(
    "arguments, error",
    [
        (
            ["train", "train.yaml", "optimizer.lrr=1"],
            "ConfigError: train.yaml: optimizer.lrr: unknown key; did you mean 'lr'?",
        ),
        (["encode", "encode.yaml", "output=unused", "source=absent"], "DataError: absent: "),
        (
            [
                "reference",
                "quick.yaml",
                "unused.safetensors",
                "--resolution-px",
                "32",
                "reference=absent",
            ],
            "DataError: absent: ",
        ),
        (
            [
                "train",
                "train.yaml",
                "run_dir=unused",
                "parallel.strategy=ddp",
                "model.patch_size=3",
            ],
            "ConfigError: model.patch_size=3",
        ),
    ],
    ids=["train", "encode", "reference, in a process group", "preflight"],
)
def test_an_input_error_is_printed_once_and_last(world, torchrun, arguments, error):
    arguments = [str(world / name) if (world / name).exists() else name for name in arguments]
    error = error.replace(": train.yaml", f": {world}/train.yaml")
    done = torchrun("-m", "lpl_pretrain", *arguments)
    assert (
        done.returncode != 0 and "Traceback" not in done.stderr and done.stderr.count(error) == 1
    ), done.stderr
    assert error in "".join(done.stderr.splitlines()[-2:]), "of two lines, where there are two"


def test_an_input_error_of_rank_1_is_printed(world, torchrun, tmp_path):
    """Rank 1 does not find the data; rank 0 waits for it and prints nothing."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    (tmp_path / "0" / "latents").symlink_to(world / "latents")
    command = (
        f"cd {tmp_path}/$LOCAL_RANK && exec {sys.executable} -m lpl_pretrain train "
        f"{world}/train.yaml run_dir={tmp_path}/run"
    )
    done = torchrun(
        "--no-python",
        "bash",
        "-c",
        f"{command} parallel.strategy=ddp data.folder=latents preflight=null",
    )
    error = "DataError: latents/index.json: not found"
    assert done.returncode != 0 and "Traceback" not in done.stderr and done.stderr.count(error) == 1
    assert done.stderr.splitlines()[-1].startswith(error) and not (tmp_path / "run").exists()


def test_without_the_plugin_the_error_ends_the_report_of_torchrun(world, torchrun):
    done = torchrun(
        "-m", "lpl_pretrain", "train", world / "train.yaml", "optimizer.lrr=1", plugin=False
    )
    error = f"ConfigError: {world}/train.yaml: optimizer.lrr: unknown key; did you mean 'lr'?"
    assert done.returncode != 0 and done.stderr.count(error) == 1
    assert error in done.stderr.splitlines()[-2], "before a line of ="


def test_a_bug_is_reported_with_its_traceback(torchrun):
    """torchrun's report is replaced for input errors only."""
    done = torchrun("--no-python", sys.executable, "-c", "import lpl_pretrain; lpl_pretrain.absent")
    assert (
        done.returncode != 0
        and "AttributeError" in done.stderr
        and "ChildFailedError" in done.stderr
    )
