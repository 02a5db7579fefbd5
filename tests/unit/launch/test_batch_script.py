"""The batch script asks for what the profile says, and quotes all input."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launch.batch_script import array_batch_script, batch_script, job_name, make_worker
from launch.job import JobSpec
from lpl_pretrain.config.cluster import ClusterProfile

HOSTILE = "a b;$(touch hacked)`touch hacked`\n#SBATCH --nodes=99\n'\""


def spec(run_dir, *argv):
    return JobSpec("train", ["train", "x.yaml", *argv], Path(run_dir), 4)


def test_options_of_sbatch_follow_the_profile(tmp_path):
    profile = ClusterProfile(
        partition="gpu",
        processes_per_node=8,
        gpus_per_node=8,
        memory_gib_per_node=0.5,
        exclude=("n1", "n2"),
        signal_s=60,
    )
    lines = batch_script(spec(tmp_path), profile).splitlines()
    for expected in (
        "nodes=4",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "mem=512M",
        "exclude=n1,n2",
        "signal=USR2@60",
        "partition=gpu",
        "requeue",
    ):
        assert f"#SBATCH --{expected}" in lines, expected
    (srun,) = (line for line in lines if line.startswith("srun "))
    assert "--kill-on-bad-exit=1" in srun
    assert lines[-1].endswith("$?") and "-m launch.epilog" in lines[-1], (
        "the last line gets the exit status of srun"
    )


@pytest.mark.parametrize("where", ["run_dir", "environment"])
def test_hostile_text_reaches_neither_shell_nor_sbatch(tmp_path, where):
    """A real shell runs the script, with programs that do nothing instead of srun and python."""
    hostile = HOSTILE.replace("\n", "")  # lines are refused: test_script_checks.py
    run_dir = tmp_path / (hostile if where == "run_dir" else "run")
    profile = ClusterProfile(
        environment={"X": hostile if where == "environment" else "x"}, python="/bin/true"
    )
    text = batch_script(spec(run_dir, HOSTILE), profile)
    assert not [line for line in text.splitlines() if line.startswith("#SBATCH --nodes=99")]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").symlink_to("/bin/true")
    (tmp_path / "script.sh").write_text(text + '\nprintf %s "$X" > x.txt\n')
    done = subprocess.run(
        ["bash", "script.sh"],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}/bin:/bin:/usr/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (
        not list(tmp_path.rglob("hacked"))
        and (tmp_path / "x.txt").read_text() == profile.environment["X"]
    )


def test_directives_end_before_the_first_command(tmp_path):
    """sbatch reads `#SBATCH` up to the first command, so not in a quoted value after it."""
    text = batch_script(
        spec(tmp_path), ClusterProfile(environment={"X": HOSTILE.replace("\n", " ")})
    )
    first_command = next(
        i for i, line in enumerate(text.splitlines()) if line and not line.startswith("#")
    )
    assert all("nodes=99" not in line for line in text.splitlines()[:first_command])


def test_job_names_are_plain():
    assert (
        job_name(spec("/runs/" + HOSTILE.replace("/", "")))
        == "a_b_touch_hacked_touch_hacked_SBATCH_--nodes_99_-train"
    )


@pytest.mark.parametrize(
    ("kind", "policy", "kill_on_hang"),
    [("train", "stop", True), ("train", "wait", False), ("encode", "stop", False)],
)
def test_only_training_is_killed_on_a_hang(tmp_path, kind, policy, kill_on_hang):
    assert (
        make_worker(JobSpec(kind, [], tmp_path, 1), ClusterProfile(on_hang=policy)).kill_on_hang
        is kill_on_hang
    )


def specs(folder, count=2):
    return [
        JobSpec("train", ["train", "x.yaml", f"n={n}"], folder / f"n={n}", 4) for n in range(count)
    ]


@pytest.mark.parametrize(
    ("count", "at_most", "option"),
    [(3, 2, "0-2%2"), (3, None, "0-2%3"), (1, None, "0-0%1"), (2, 9, "0-1%2")],
)
def test_options_of_an_array(tmp_path, count, at_most, option):
    lines = array_batch_script(
        specs(tmp_path / "a sweep", count), ClusterProfile(), at_most, tmp_path / "links"
    ).splitlines()
    assert [line for line in lines if "--array" in line] == [f"#SBATCH --array={option}"]
    assert "#SBATCH --job-name=a_sweep-train" in lines and "#SBATCH --requeue" in lines
