"""Sweeps: values, names of runs, checks before submission, and the whole command."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml

from launch.job_folder import (
    JobFolder,
)
from launch.sweep import LONGEST_NAME, combinations, plan_runs, run_name, split_values
from lpl_pretrain.config.load import dump, load_config
from lpl_pretrain.config.override import as_override
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.errors import ConfigError
from tests.support.commands import ROOT
from tests.support.configs import dataset_index, train_config

HOSTILE = "a b;$(touch hacked)'\""


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0,0.1,0.2", ["0", "0.1", "0.2"]),
        ("[0.9,0.99],[0.9,0.95]", ["[0.9,0.99]", "[0.9,0.95]"]),
        ("null,{kind: a, of: [1,2]}", ["null", "{kind: a, of: [1,2]}"]),
        ("'a,b',\"c]\",d", ["'a,b'", '"c]"', "d"]),
    ],
)
def test_values_are_split_at_outer_commas(text, values):
    assert split_values(text) == values
    assert text.split(",") == values or len(text.split(",")) > len(values), (
        "a plain split differs where there are inner commas"
    )


def test_last_key_changes_fastest():
    changes = combinations(["a=1,2", "b=x,[y,z]"])
    assert changes == [("a=1", "b=x"), ("a=1", "b=[y,z]"), ("a=2", "b=x"), ("a=2", "b=[y,z]")]
    assert combinations([]) == [()], "one run without overrides"


@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        (["lpl"], "wanted key=value,value"),
        (["a=1,,2"], "wanted key=value,value"),
        (["=1"], "wanted key=value,value"),
        (["a=1", "a=2"], "--sweep a: given 2 times"),
        (["run_dir=x,y"], "--sweep run_dir: cannot be swept"),
        (["name=x,y"], "--sweep name: cannot be swept"),
        (["a=1,1"], "2 combinations would be called a=1"),
        (["a=x y,x_y"], "2 combinations would be called a=x_y"),
    ],
)
def test_invalid_sweeps_are_refused(sweeps, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        combinations(sweeps)


def test_run_names_hold_the_values_and_are_safe(tmp_path):
    assert (
        run_name(("lpl.target_fraction=0.1", "optimizer.lr=1e-4"))
        == "lpl.target_fraction=0.1,optimizer.lr=1e-4"
    )
    assert (
        run_name(("optimizer.betas=[0.9,0.99]",)) == "optimizer.betas=0.9_0.99"
        and run_name(()) == ""
    )
    for value in (HOSTILE, "../../up", "a/b", "%j\n", "-rf"):
        name = run_name((f"key={value}",))
        assert re.fullmatch(r"key=[A-Za-z0-9._+-]*", name) and (tmp_path / name).parent == tmp_path
    long, longer = (run_name((f"key={'x' * count}",)) for count in (500, 501))
    assert len(long) == len(longer) == LONGEST_NAME and long != longer


@pytest.fixture
def config(tmp_path):
    """Configuration of a run with the packaged autoencoder, whose data folder has only an index."""
    from lpl_pretrain.config.hashing import autoencoder_identity
    from lpl_pretrain.config.load import resolve_path

    identity = autoencoder_identity(resolve_path("asset:autoencoder_emoji"))
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "index.json").write_text(
        dataset_index(identity=identity).model_dump_json()
    )
    settings = train_config(
        data__folder=str(tmp_path / "latents"),
        run_dir=str(tmp_path / "swept"),
        parallel__strategy="ddp",
    )
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    return tmp_path / "train.yaml"


def test_one_run_for_each_combination(config, tmp_path):
    runs = plan_runs(str(config), ["steps=7"], ["optimizer.lr=1e-3,2e-3"], 2)
    assert [run.run_dir for run in runs] == [
        tmp_path / "swept" / f"optimizer.lr={rate}" for rate in ("1e-3", "2e-3")
    ]
    assert [run.settings.optimizer.lr for run in runs] == [1e-3, 2e-3] and {
        run.settings.steps for run in runs
    } == {7}
    assert runs[1].argv == [
        "train",
        str(config),
        "steps=7",
        "optimizer.lr=2e-3",
        f'run_dir="{runs[1].run_dir}"',
    ]
    assert {run.settings.run_dir for run in runs} == {str(run.run_dir) for run in runs}
    (alone,) = plan_runs(str(config), [], [], 2)
    assert alone.run_dir == tmp_path / "swept"


def test_error_lists_every_refused_combination(config):
    with pytest.raises(ConfigError) as refusal:
        plan_runs(str(config), [], ["batch.global_batch_size=8,9", "steps=2,0"], 2)
    lines = str(refusal.value).splitlines()
    names = [
        f"batch.global_batch_size={size},steps={steps}" for size, steps in ((8, 0), (9, 2), (9, 0))
    ]
    assert [line.partition(": ")[0] for line in lines] == names
    assert "global_batch_size=9 is not a multiple of dp_world_size=2" in lines[1]
    with pytest.raises(ConfigError, match="optimizer.rate=1: .*unknown key"):
        plan_runs(str(config), [], ["optimizer.rate=1,2"], 2)


def test_folder_of_another_run_is_refused(config, tmp_path):
    taken = RunDir(tmp_path / "swept" / "optimizer.lr=1e-3")
    taken.path.mkdir(parents=True)
    taken.config.write_text(config.read_text().replace("seed: 0", "seed: 1"))
    taken.metrics.write_text('{"step": 1}\n')  # without a step it would take this configuration
    with pytest.raises(
        ConfigError,
        match=r"optimizer.lr=1e-3: .* belongs to another configuration:\n(.*\n)*  seed: the "
        r"run has 1",
    ):
        plan_runs(str(config), [], ["optimizer.lr=1e-3,2e-3"], 2)
    plan_runs(str(config), [], ["optimizer.lr=2e-3,3e-3"], 2)


def test_folder_is_a_run_or_a_sweep(config, tmp_path):
    JobFolder(tmp_path / "swept" / "x" / "launch").path.mkdir(parents=True)
    plan_runs(str(config), [], [], 2)
    JobFolder(tmp_path / "swept" / "x" / "launch").write_record({"job": "1"})
    with pytest.raises(ConfigError, match="swept: holds the runs of a sweep"):
        plan_runs(str(config), [], [], 2)
    plan_runs(str(config), [], ["optimizer.lr=1e-3"], 2)
    (tmp_path / "swept" / "config.yaml").write_text(config.read_text())
    with pytest.raises(ConfigError, match="swept: is a run itself"):
        plan_runs(str(config), [], ["optimizer.lr=1e-3"], 2)


def test_sweep_command(config, slurm_programs):
    """Each run gets a watching job that starts after it."""
    profile, protocol = slurm_programs / "cluster.yaml", slurm_programs / "protocol.yaml"
    profile.write_text("partition: gpu\n")
    scoring = {
        "name": "p",
        "images": 8,
        "sampler": {"kind": "euler"},
        "reference": str(slurm_programs),
    }
    protocol.write_text(yaml.safe_dump(scoring))

    def launch(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "launch", *map(str, arguments)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    swept = [
        "train",
        config,
        "--sweep",
        "optimizer.lr=1e-3,2e-3",
        "--sweep-at-most",
        1,
        "--cluster",
        profile,
    ]
    shown = launch(*swept, "--dry-run")
    assert (
        shown.returncode == 0
        and "#SBATCH --array=0-1%1" in shown.stdout
        and not (slurm_programs / "swept").exists()
    )
    assert [
        line.partition(": ")[0] for line in shown.stdout.splitlines() if "optimizer.lr=" in line
    ] == ["# 0", "# 1"]
    wrong = launch(*swept, "--sweep", "steps=0,5")
    assert (
        wrong.returncode == 2
        and "optimizer.lr=1e-3,steps=0: " in wrong.stderr
        and not (slurm_programs / "swept").exists()
    )
    sent = launch(*swept, "--evaluate-with", protocol)
    assert sent.returncode == 0, sent.stderr
    waits = [
        line
        for line in (slurm_programs / "singles.sh").read_text().splitlines()
        if "--dependency" in line
    ]
    assert waits == [f"#SBATCH --dependency=after:4711_{n}" for n in range(2)]
    assert "job 4711_1, optimizer.lr=2e-3" in sent.stdout
    refused = launch("resume", slurm_programs / "swept")
    assert (
        refused.returncode == 2
        and "all its runs are complete, or in SLURM's queue" in refused.stderr
    )
    (slurm_programs / "bin" / "squeue").write_text("#!/bin/sh\necho 4711_0 RUNNING\n")
    assert "1 jobs, each 1 nodes x 1 processes" in launch("resume", slurm_programs / "swept").stdout
    assert "#SBATCH --array=0-0%1" in (slurm_programs / "submitted.sh").read_text()


def test_finished_run_is_not_submitted(config, slurm_programs):
    """The other runs of a sweep are submitted."""
    profile = slurm_programs / "cluster.yaml"
    profile.write_text("partition: gpu\n")

    def launch(*arguments):
        command = [
            sys.executable,
            "-m",
            "launch",
            "train",
            config,
            *map(str, arguments),
            "--cluster",
            profile,
        ]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = RunDir(slurm_programs / "swept" / "optimizer.lr=1e-3")
    settings = load_config(
        TrainConfig, str(config), ["optimizer.lr=1e-3", as_override("run_dir", str(done.path))]
    )
    done.path.mkdir(parents=True)
    done.config.write_text(dump(settings))
    done.checkpoint(settings.steps).mkdir(parents=True)
    (done.checkpoint(settings.steps) / "manifest.json").write_text('{"files": {}}')
    alone = launch("optimizer.lr=1e-3", as_override("run_dir", str(done.path)))
    assert (
        alone.returncode == 0 and f"{done.path}: complete: {settings.steps} of" in alone.stdout
    ), alone.stderr
    assert not (slurm_programs / "submitted.sh").exists() and not (done.path / "launch").exists()
    swept = launch("--sweep", "optimizer.lr=1e-3,2e-3")
    assert (
        swept.returncode == 0
        and "complete" in swept.stdout
        and "#SBATCH --array=0-0" in (slurm_programs / "submitted.sh").read_text()
    )
    assert not (done.path / "launch").exists()
