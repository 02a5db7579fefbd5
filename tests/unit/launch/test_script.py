"""A batch script holds our lines only: everything else is refused before anything is written or
submitted.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from launch import batch_script as batch_script_module
from launch.batch_script import batch_script
from launch.cli import commands
from launch.job import JobSpec
from launch.job_folder import JobFolder
from launch.profile import ClusterProfile
from launch.script_checks import check_script, check_setup, resolve_path
from launch.submit import submit, submit_array
from launch.worker import Worker
from lpl_pretrain.config.load import validate
from lpl_pretrain.errors import BAD_INPUT, ConfigError
from lpl_pretrain.runtime.source_hash import ROOT, source_hash

ATTACK = "x\ntouch PWNED #\n"
CONTROL = ["\n", "\r", "\0", "\x1b", "\x7f", "\x85", "\u2028", "\u2029", "\udcff"]


def spec(folder, **options):
    return JobSpec("train", ["train", "x.yaml"], Path(folder), 1, **options)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Where sbatch and srun are; sbatch notes that it was called."""
    (tmp_path / "bin").mkdir()
    for name, line in {
        "sbatch": f"touch {tmp_path}/submitted; echo 1",
        "srun": ":",
        "squeue": ":",
    }.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path


@pytest.mark.parametrize("broken", [False, True])
def test_a_line_break_in_a_name_runs_nothing(programs, monkeypatch, broken):
    """Without the checks the shell runs what follows it."""
    if broken:
        monkeypatch.setattr(batch_script_module, "check_folder", lambda path: None)
        monkeypatch.setattr(batch_script_module, "check_script", lambda text, own: text)
    wanted = spec(programs / ATTACK), ClusterProfile(python="/bin/true")
    if broken:
        (programs / "script.sh").write_text(batch_script(*wanted))
        subprocess.run(["bash", "script.sh"], cwd=programs, capture_output=True)
    else:
        with pytest.raises(ConfigError, match=r"control character '\\n'"):
            batch_script(*wanted)
    assert (programs / "PWNED").exists() is broken


@pytest.mark.parametrize("character", [*CONTROL[:2], *CONTROL[3:], "%", "\\"], ids=ascii)
def test_what_a_folder_of_a_job_cannot_be_called(programs, character):
    folder = programs / f"runs{character}x"
    for send in (
        lambda: submit(spec(folder), ClusterProfile()),
        lambda: submit_array([spec(folder)], ClusterProfile(), 1),
    ):
        with pytest.raises(
            ConfigError,
            match="holds the control character|a job cannot keep its files in a folder with",
        ):
            send()
    assert sorted(path.name for path in programs.iterdir()) == ["bin"], (
        "nothing was written or submitted"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"environment": {"X": "a\nb"}}, "environment.X: holds the control character"),
        ({"setup": ["true\ntouch PWNED"]}, "setup.0: holds the control character"),
        ({"python": "python\n"}, r"python=.* has the control character"),
        ({"container": ["run\r"]}, r"container.* has the control character"),
        ({"partition": "gpu\n"}, "partition="),
        ({"account": "a b"}, "account="),
        ({"exclude": ["n1\n#SBATCH --uid=0"]}, "exclude.0="),
        ({"environment": {"A B": "x"}}, "environment"),
        (
            {"environment": 5, "setup": 5, "container": {"a": 1}},
            "(?s)setup=5.*container=.*environment=5",
        ),
    ],
)
def test_profiles_hold_plain_lines(changes, words):
    with pytest.raises(ConfigError, match=words):
        validate(ClusterProfile, changes, where="profile.yaml")


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        (["echo 'open"], "not complete as shell"),
        (['echo "open', "true"], "not complete as shell"),
        (["export A=1 \\"], "continues on the next one"),
        (["cat <<END"], "here-document"),
        (["if true; then"], "not complete as shell"),
        (["$(touch"], "not complete as shell"),
        (["#SBATCH --uid=0"], "sbatch would read it as an option"),
    ],
)
def test_setup_is_complete_by_itself(tmp_path, setup, words):
    """What is left open would take in our lines, and turn their quotes inside out."""
    with pytest.raises(ConfigError, match=words):
        batch_script(spec(tmp_path), ClusterProfile(setup=setup))


def test_setup_of_several_lines_is_shell():
    check_setup(
        [
            "if [ -f x ]; then",
            "\tmodule load cuda  # it's here",
            "fi",
            "cat <<'END'",
            "$(x)",
            "END",
            "echo \\\\",
        ]
    )


FOREIGN = [
    "touch x",
    "#SBATCH --uid=0",
    "#SBATCH --output='a",
    "#SBATCH --output=$(touch x)",
    "#SBATCH --output=a b",
    "#SBATCH --output='a\\b'",
    "# comment",
    "srun `touch x`",
    "srun a; touch x",
    "srun 'a",
    "export X=1",
    " ",
    "\r",
]


@pytest.mark.parametrize("line", FOREIGN)
def test_a_line_that_is_not_ours_is_refused(tmp_path, line):
    text = batch_script(spec(tmp_path), ClusterProfile())
    own = {
        found for found in text.split("\n") if found.startswith(("export PYTHONPATH", "trap", "/"))
    }
    assert check_script(text, own) == text
    lines = text.split("\n")
    for at in (3, len(lines) // 2, len(lines)):
        with pytest.raises(ConfigError, match=f"line {at + 1} of the batch script"):
            check_script("\n".join([*lines[:at], line, *lines[at:]]), own)


@pytest.mark.parametrize(
    "command", ["status", "logs", "cancel", "resume", "evaluate", "watch", "sample"]
)
@pytest.mark.parametrize(
    "run", ["x\ny", "x\x1b[2J", "\udcff", "", "x" * 300], ids=lambda run: ascii(run)[:10]
)
def test_runs_on_the_command_line_are_paths(command, run):
    more = {
        "evaluate": ["p.yaml", "--cluster=c"],
        "watch": ["p.yaml", "--cluster=c"],
        "sample": ["--cluster", str(ROOT / "configs/cluster/slurm.yaml")],
    }
    done = CliRunner().invoke(commands, [command, run, *more.get(command, [])])
    assert isinstance(done.exception, ConfigError) and str(done.exception).startswith("RUN=")


def test_a_circle_of_links_is_no_run(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    try:
        assert not resolve_path(str(tmp_path / "a"), "RUN").exists()
    except ConfigError as refusal:
        assert "not a path" in str(refusal)


def test_a_run_with_wildcards_in_its_name_is_found_exactly(tmp_path):
    for name in ("a[1]*?", "a1x"):
        folder = JobFolder(tmp_path / name / "launch")
        folder.path.mkdir(parents=True)
        folder.write_exit("7", 0, len(name), 1, name, stopped=False)
        folder.stacks("7", 0, 0, name).touch()
    found = JobFolder(tmp_path / "a[1]*?" / "launch")
    assert [exit["host"] for exit in found.exits("7", 0)] == ["a[1]*?"]
    assert found.silent_ranks("7", 0) == [{"rank": 0, "host": "a[1]*?"}]


def test_the_job_runs_where_it_was_submitted(tmp_path, monkeypatch):
    """And says so where its node does not see that folder, instead of going on in another one."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="removes backslashes"):
        batch_script(spec(tmp_path / "run", cwd="/a\\b"), ClusterProfile())
    wanted = spec(tmp_path / "run")
    assert f"#SBATCH --chdir={tmp_path}" in batch_script(wanted, ClusterProfile()).splitlines()
    for name, value in {"JOB_ID": "7", "PROCID": "0", "LOCALID": "0", "NTASKS": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "run").mkdir()
    there = Worker(
        [], str(tmp_path / "run"), ["sh", "-c", "pwd > where"], source_hash(), cwd=str(tmp_path)
    )
    assert there() == 0 and (tmp_path / "where").read_text().strip() == str(tmp_path)
    gone = Worker(
        [], str(tmp_path / "run"), ["touch", "begun"], source_hash(), cwd=str(tmp_path / "gone")
    )
    with pytest.raises(SystemExit) as ended:
        gone()
    assert ended.value.code == BAD_INPUT and not list(tmp_path.rglob("begun"))


def test_words_of_a_path_are_no_words_of_the_scheduler():
    from launch.slurm import parse_fields

    shown = (
        "JobId=7 JobState=RUNNING Restarts=0 StdErr=/runs/x JobState=CANCELLED "
        "Restarts=9/launch/7.err"
    )
    assert parse_fields(shown)["JobState"] == "RUNNING" and parse_fields(shown)["Restarts"] == "0"
