"""Checks of everything that enters a batch script: a script never holds a line that is not ours."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path

from lpl_pretrain.config.names import control_character
from lpl_pretrain.errors import ConfigError

SBATCH_OPTIONS = frozenset(
    [
        "account",
        "array",
        "chdir",
        "constraint",
        "cpus-per-task",
        "dependency",
        "error",
        "exclude",
        "gpus-per-node",
        "job-name",
        "kill-on-invalid-dep",
        "mem",
        "nodes",
        "ntasks-per-node",
        "open-mode",
        "output",
        "partition",
        "qos",
        "requeue",
        "signal",
        "time",
    ]
)
"""Options of sbatch that our jobs use."""
DIRECTIVE = re.compile(r"#SBATCH --([a-z-]+)(?:=(.*))?")
FIXED_LINE = re.compile(
    r"#!/bin/bash|# (Parameters|setup|command|teardown)|export SUBMITIT_EXECUTOR=slurm|"
)
DIRECTIVE_PREFIXES = ("#SBATCH", "#SLURM", "#PBS", "#BSUB")
"""Beginnings of comments that sbatch reads as options."""
FORBIDDEN_IN_FOLDERS = {
    "%": "SLURM replaces patterns such as %j in the names of log files, and srun cannot escape %u",
    "\\": "SLURM removes backslashes from the names of log files",
}


def refuse_control_characters(text: str, where: str, allowed: str = "") -> str:
    """Return `text`.  Raises ConfigError when it holds a control character."""
    if (character := control_character(text, allowed)) is not None:
        raise ConfigError(f"{where}={text!r}: holds the control character {character!r}: remove it")
    return text


def resolve_path(text: str, where: str) -> Path:
    """Absolute path of `text`.  Raises ConfigError when it is not a path."""
    refuse_control_characters(text, where)
    if not text:
        raise ConfigError(f"{where}='': wanted the path of a folder")
    try:
        path = Path(text).resolve()
        path.is_dir()  # raises for a name that is too long, or a folder that may not be read
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{where}={text!r}: not a path: {error}") from None
    return path


def check_folder(path: Path) -> None:
    """Raises ConfigError for a job folder whose log files SLURM would write elsewhere."""
    text = refuse_control_characters(str(path), "folder")
    for character, reason in FORBIDDEN_IN_FOLDERS.items():
        if character in text:
            raise ConfigError(
                f"{text!r}: a job cannot keep its files in a folder with {character!r} in its "
                f"path: {reason}: choose another run_dir, name or output"
            )


def check_working_directory(path: str) -> None:
    """Raises ConfigError for a working directory that sbatch cannot change to."""
    refuse_control_characters(path, "the folder from which a job is submitted")
    if "\\" in path:
        raise ConfigError(
            f"{path!r}: sbatch removes backslashes from the path of this folder: submit from "
            "another one"
        )


def check_setup(lines: Sequence[str]) -> None:
    """Raises ConfigError unless `lines` are complete shell code by themselves.

    An open quote, a here-document or a continued line would swallow the lines that follow.
    """
    if not lines:
        return
    for line in lines:
        refuse_control_characters(line, "setup", allowed="\t")
        if line.startswith(DIRECTIVE_PREFIXES):
            raise ConfigError(
                f"setup={line!r}: sbatch would read it as an option: use the profile's keys, or "
                "sbatch's environment variables (SBATCH_...)"
            )
    if (error := _syntax_error(tuple(lines))) is not None:
        raise ConfigError(f"setup={list(lines)}: not complete as shell: {error}")


@cache
def _syntax_error(lines: tuple[str, ...]) -> str | None:
    """bash's message about incomplete or invalid lines; None when they are complete.  Nothing is
    run.
    """
    if (len(lines[-1]) - len(lines[-1].rstrip("\\"))) % 2:
        return "its last line continues on the next one"
    parsed = subprocess.run(
        ["bash", "--norc", "--noprofile", "-n"],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        check=False,
    )
    if parsed.returncode or parsed.stderr:
        return parsed.stderr.strip() or "bash refuses it"
    return None


def check_script(text: str, own: Collection[str]) -> str:
    """Return `text`.  Raises ConfigError for a line that is neither in `own` nor one that submitit
    writes: an sbatch option or an srun call in which every value is one quoted word.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if control_character(line, allowed="\t") or not (line in own or _is_expected(line)):
            raise ConfigError(
                f"line {number} of the batch script would be {line!r}, which no part of it may be: "
                "nothing was submitted; look for line breaks and unusual characters in names, "
                "folders and the profile"
            )
    return text


def _is_expected(line: str) -> bool:
    """Whether submitit writes such a line."""
    if FIXED_LINE.fullmatch(line):
        return True
    if line.startswith("srun "):
        return _is_quoted(line)
    directive = DIRECTIVE.fullmatch(line)
    if directive is None or directive[1] not in SBATCH_OPTIONS:
        return False
    if "\\" in line:  # sbatch removes backslashes, also between quotes
        return False
    value = directive[2]
    return value is None or (_is_quoted(value) and len(shlex.split(value)) == 1)


def _is_quoted(text: str) -> bool:
    """Whether no character of `text` has a meaning for a shell."""
    try:
        return shlex.join(shlex.split(text)) == text
    except ValueError:
        return False
