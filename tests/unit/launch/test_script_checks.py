"""Checks of the batch script: every line that is not ours is refused before anything is written."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launch import batch_script as batch_script_module
from launch.batch_script import batch_script
from launch.job import JobSpec
from launch.script_checks import check_script, check_setup
from launch.submit import submit, submit_array
from lpl_pretrain.config.cluster import ClusterProfile
from lpl_pretrain.errors import ConfigError

ATTACK = "x\ntouch PWNED #\n"


CONTROL = ["\n", "\r", "\0", "\x1b", "\x7f", "\x85", "\u2028", "\u2029", "\udcff"]


def spec(folder, **options):
    return JobSpec("train", ["train", "x.yaml"], Path(folder), 1, **options)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Folder with sbatch and srun on the PATH; sbatch creates a file when it is called."""
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
def test_line_break_in_a_name_runs_nothing(programs, monkeypatch, broken):
    """Without the checks the shell runs the second line."""
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
def test_forbidden_characters_in_job_folders(programs, character):
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
    ("setup", "message"),
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
def test_incomplete_setup_is_refused(tmp_path, setup, message):
    """An open quote would swallow our lines, and invert their quotes."""
    with pytest.raises(ConfigError, match=message):
        batch_script(spec(tmp_path), ClusterProfile(setup=setup))


def test_setup_may_span_several_lines():
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
def test_foreign_line_is_refused(tmp_path, line):
    text = batch_script(spec(tmp_path), ClusterProfile())
    own = {
        line_of_script
        for line_of_script in text.split("\n")
        if line_of_script.startswith(("export PYTHONPATH", "trap", "/"))
    }
    assert check_script(text, own) == text
    lines = text.split("\n")
    for at in (3, len(lines) // 2, len(lines)):
        with pytest.raises(ConfigError, match=f"line {at + 1} of the batch script"):
            check_script("\n".join([*lines[:at], line, *lines[at:]]), own)
