"""Commands of `python -m launch`, run as processes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from launch.cli import commands
from launch.script_checks import resolve_path
from lpl_pretrain.errors import ConfigError
from tests.support.commands import ROOT


def launch(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "launch", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def test_commands_without_slurm(tmp_path):
    """Everything else is checked first; the error then names the remedy."""
    profile = tmp_path / "cluster.yaml"
    profile.write_text(yaml.safe_dump({"environment": {"X": "1"}}))
    config = ROOT / "configs/encode/emoji.yaml"
    path = {**os.environ, "PATH": "/nowhere"}
    arguments = ("encode", config, f"output={tmp_path}/latents", "--cluster", profile)
    assert (
        "sbatch: not on the PATH: submit from a login node"
        in (refused := launch(*arguments, env=path)).stderr
    )
    assert refused.returncode == 2
    shown = launch(*arguments, "--dry-run", env={**path, "WANDB_API_KEY": "very-secret"})
    assert (
        shown.returncode == 0
        and "export X=1" in shown.stdout
        and "resolution_px: 64" in shown.stdout
    )
    assert "very-secret" not in shown.stdout and not (tmp_path / "latents").exists()
    assert "nothing was launched" in launch("status", tmp_path).stderr
    (tmp_path / "sbatch").touch(0o755)
    there = {**path, "PATH": str(tmp_path)}
    blind = launch("encode", config, f"output={profile}/latents", "--cluster", profile, env=there)
    assert (
        blind.returncode == 2
        and "cannot be made from here" in blind.stderr
        and "Traceback" not in blind.stderr
    )
    unknown = launch("encode", config, "--cluster", profile, "--set", "colour=red")
    assert unknown.returncode == 2 and "colour" in unknown.stderr


def test_watching_job_asks_for_one_cpu(tmp_path):
    profile = tmp_path / "my cluster.yaml"
    keys = {
        "partition": "gpu",
        "cpu_partition": "small",
        "processes_per_node": 8,
        "gpus_per_node": 8,
        "container": ["run", "it"],
    }
    profile.write_text(yaml.safe_dump({**keys, "memory_gib_per_node": 900}))
    shown = launch(
        *(
            "evaluate",
            tmp_path / "a run",
            ROOT / "configs/evaluate/emoji.yaml",
            "images=2048",
            "--watch",
            "--at-most",
            3,
        ),
        *("--nodes", 2, "--set", "qos=low", "--cluster", profile, "--dry-run"),
    )
    assert shown.returncode == 0, shown.stderr
    for wanted in ("partition=small", "nodes=1", "ntasks-per-node=1", "cpus-per-task=1", "qos=low"):
        assert f"#SBATCH --{wanted}\n" in shown.stdout, wanted
    assert "gpus" not in shown.stdout and "#SBATCH --mem" not in shown.stdout
    (command,) = (
        line for line in shown.stdout.splitlines() if line.startswith("# python -m launch watch")
    )
    for wanted in (
        "images=2048",
        f"--cluster={profile}",
        "--at-most=3",
        "--nodes=2",
        "--set=qos=low",
    ):
        assert shlex.quote(wanted) in command, wanted
    assert "images: 2048" in shown.stdout


def test_launch_imports_no_torch():
    modules = (
        "launch.__main__, launch.submit, launch.monitor, launch.epilog, launch.worker, "
        "launch.evaluation_jobs"
    )
    code = (
        f"import sys, {modules}; print([name for name in ('torch', 'diffusers') if name in "
        "sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]", done.stdout


def test_the_console_script_is_the_module():
    script = subprocess.run(
        [Path(sys.executable).with_name("lpl-launch"), "--help"], capture_output=True, text=True
    )
    usage, _, options = script.stdout.partition("\n")
    assert usage.startswith("Usage: lpl-launch") and "SLURM" in options
    assert launch("--help").stdout.partition("\n")[2] == options


@pytest.mark.parametrize(
    "command", ["status", "logs", "cancel", "resume", "evaluate", "watch", "sample"]
)
@pytest.mark.parametrize(
    "run", ["x\ny", "x\x1b[2J", "\udcff", "", "x" * 300], ids=lambda run: ascii(run)[:10]
)
def test_run_argument_must_be_a_path(command, run):
    more = {
        "evaluate": ["p.yaml", "--cluster=c"],
        "watch": ["p.yaml", "--cluster=c"],
        "sample": ["--cluster", str(ROOT / "configs/cluster/slurm.yaml")],
    }
    done = CliRunner().invoke(commands, [command, run, *more.get(command, [])])
    assert isinstance(done.exception, ConfigError) and str(done.exception).startswith("RUN=")


def test_loop_of_links_is_no_run(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    try:
        assert not resolve_path(str(tmp_path / "a"), "RUN").exists()
    except ConfigError as refusal:
        assert "not a path" in str(refusal)
