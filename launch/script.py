"""Checks of what goes into a batch script: a generated script never holds a line that is not ours."""

from __future__ import annotations

import re
import shlex
import subprocess
import unicodedata
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path

from lpl_pretrain.errors import ConfigError

DIRECTIVES = frozenset(
    {
        *(
            "account",
            "array",
            "chdir",
            "constraint",
            "cpus-per-task",
            "dependency",
            "error",
            "exclude",
        ),
        *("gpus-per-node", "job-name", "kill-on-invalid-dep", "mem", "nodes", "ntasks-per-node"),
        *("open-mode", "output", "partition", "qos", "requeue", "signal", "time"),
    }
)
"""Options of sbatch that our jobs use."""
DIRECTIVE = re.compile(r"#SBATCH --([a-z-]+)(?:=(.*))?")
FIXED = re.compile(
    r"#!/bin/bash|# (Parameters|setup|command|teardown)|export SUBMITIT_EXECUTOR=slurm|"
)
READ_BY_SBATCH = ("#SBATCH", "#SLURM", "#PBS", "#BSUB")
NOT_IN_FOLDERS = {
    "%": "the scheduler replaces patterns such as %j in the names of log files, and srun has no "
    "way to write %u as it is",
    "\\": "the scheduler removes backslashes from the names of log files",
}


def control_character(text: str, allowed: str = "") -> str | None:
    """The first line break, control character or undecodable byte in `text`."""
    kinds = ("Cc", "Cs", "Zl", "Zp")
    return next((c for c in text if unicodedata.category(c) in kinds and c not in allowed), None)


def refuse_control_characters(text: str, where: str, allowed: str = "") -> str:
    """Return `text`.  Raises ConfigError when it holds a control character."""
    if (found := control_character(text, allowed)) is not None:
        raise ConfigError(f"{where}={text!r}: holds the control character {found!r}: remove it")
    return text


def resolved(text: str, where: str) -> Path:
    """The absolute path that `text` means here.  Raises ConfigError when it is none."""
    refuse_control_characters(text, where)
    if not text:
        raise ConfigError(f"{where}='': wanted the path of a folder")
    try:
        path = Path(text).resolve()
        path.is_dir()  # raises for a name that is too long, or a folder that may not be read
        return path
    except (OSError, RuntimeError, ValueError) as problem:
        raise ConfigError(f"{where}={text!r}: not a path: {problem}") from None


def check_folder(path: Path) -> None:
    """Raises ConfigError for the folder of a job whose log files the scheduler would put elsewhere."""
    text = refuse_control_characters(str(path), "folder")
    for character, reason in NOT_IN_FOLDERS.items():
        if character in text:
            raise ConfigError(
                f"{text!r}: a job cannot keep its files in a folder with {character!r} in its "
                f"path: {reason}: "
                "choose another run_dir, name or output"
            )


def check_working_directory(path: str) -> None:
    """Raises ConfigError for a folder to which sbatch would not go."""
    refuse_control_characters(path, "the folder from which a job is submitted")
    if "\\" in path:
        raise ConfigError(
            f"{path!r}: sbatch removes backslashes from the path of this folder: submit from "
            "another one"
        )


def check_setup(lines: Sequence[str]) -> None:
    """Raises ConfigError unless `lines` are complete shell by themselves: an open quote,
    here-document or continued line would take in the lines that follow it.
    """
    if not lines:
        return
    for line in lines:
        refuse_control_characters(line, "setup", allowed="\t")
        if line.startswith(READ_BY_SBATCH):
            raise ConfigError(
                f"setup={line!r}: sbatch would read it as an option: use the profile's keys, or "
                "sbatch's "
                "environment variables (SBATCH_...)"
            )
    if (words := _incomplete(tuple(lines))) is not None:
        raise ConfigError(f"setup={list(lines)}: not complete as shell: {words}")


@cache
def _incomplete(lines: tuple[str, ...]) -> str | None:
    """What bash says when it reads them, without running anything; None when they are complete."""
    if (len(lines[-1]) - len(lines[-1].rstrip("\\"))) % 2:
        return "its last line continues on the next one"
    shell = ["bash", "--norc", "--noprofile", "-n"]
    parsed = subprocess.run(
        shell, input="\n".join(lines) + "\n", capture_output=True, text=True, check=False
    )
    return parsed.stderr.strip() or "it is refused" if parsed.returncode or parsed.stderr else None


def check_script(text: str, own: Collection[str]) -> str:
    """Return `text`.  Raises ConfigError for a line that neither is one of `own` nor one that
    submitit writes: an option of sbatch or a call of srun, in which every value is one quoted word.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if control_character(line, allowed="\t") or not (line in own or _is_ours(line)):
            raise ConfigError(
                f"line {number} of the batch script would be {line!r}, which no part of it may be: "
                "nothing was "
                "submitted; look for line breaks and unusual characters in names, folders and "
                "the profile"
            )
    return text


def _is_ours(line: str) -> bool:
    if FIXED.fullmatch(line):
        return True
    if line.startswith("srun "):
        return _is_quoted(line)
    directive = DIRECTIVE.fullmatch(line)
    if directive is None or directive[1] not in DIRECTIVES:
        return False
    if "\\" in line:  # which sbatch removes, also between quotes
        return False
    value = directive[2]
    return value is None or (_is_quoted(value) and len(shlex.split(value)) == 1)


def _is_quoted(words: str) -> bool:
    """Whether no character of `words` means anything to a shell."""
    try:
        return shlex.join(shlex.split(words)) == words
    except ValueError:
        return False
