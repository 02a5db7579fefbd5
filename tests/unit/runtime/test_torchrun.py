"""Who records an error, and what torchrun prints of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lpl_pretrain.runtime import torchrun
from lpl_pretrain.runtime.torchrun import peer_failed, plugin, record_error, report

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def files(tmp_path):
    """Of three ranks, as torchrun lays them out."""
    for rank in range(3):
        (tmp_path / "attempt_0" / str(rank)).mkdir(parents=True)
    return [tmp_path / "attempt_0" / str(rank) / "error.json" for rank in range(3)]


def test_of_ranks_with_one_error_one_records_it(files):
    for file, text in zip(files, ("a: b", "a: c", "a: b")):
        record_error(text, file)
    assert [file.exists() for file in files] == [True, True, False]
    found = json.loads(files[0].read_text())
    assert found["message"]["extraInfo"]["py_callstack"] == found["lpl_pretrain"] == "a: b"


def test_torchrun_reads_what_is_recorded(files):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    record_error("ConfigError: x=1", files[1])
    failures = {rank: ProcessFailure(rank, 1, 2, str(file)) for rank, file in enumerate(files)}
    error = ChildFailedError("lpl_pretrain", failures)
    assert str(error).count("ConfigError: x=1") == 1 and error.get_first_failure()[0] == 1
    assert "ConfigError: x=1" in str(error).partition("Root Cause")[2]


def test_the_others_know_of_it(files):
    assert not any(map(peer_failed, files))
    record_error("a", files[1])
    assert [peer_failed(file) for file in files] == [True, False, True]


def failure(text):
    return SimpleNamespace(
        error_file_data={"message": "", **({"lpl_pretrain": text} if text else {})}
    )


class ChildFailedError(Exception):
    def __init__(self, *texts):
        super().__init__("torchrun's own report")
        self.failures = dict(enumerate(map(failure, texts)))


class SignalException(Exception):
    pass


@pytest.mark.parametrize(
    "error, said",
    [
        (ChildFailedError(None, "E: a", "E: a", "E: b"), "E: a\nE: b\n"),
        (SignalException("SIGINT"), ""),
        (ChildFailedError(None, None), "own report"),
        (ValueError("other"), "ValueError: other"),
    ],
)
def test_what_the_plugin_prints(capsys, error, said):
    report(type(error), error, None)
    found = capsys.readouterr().err
    assert said in found and (found == said or not said.startswith("E: "))
    assert found or isinstance(error, SignalException)


@pytest.mark.parametrize(
    "arguments, ours",
    [
        (["torchrun", "-m", "lpl_pretrain", "train"], True),
        (["torchrun", "--no-python", "bash", "-c", "cd x && lpl-pretrain train"], True),
        (["torchrun", "other.py"], False),
    ],
)
def test_the_plugin_leaves_other_programs_alone(monkeypatch, arguments, ours):
    before = sys.excepthook
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys, "excepthook", before)
    with pytest.raises(ValueError, match="leave it out"):
        plugin()()
    assert (sys.excepthook is torchrun.report) == ours


def test_a_command_that_cannot_be_read_is_recorded_too(files):
    """click's own errors; outside of torchrun click prints them."""
    command = [sys.executable, "-m", "lpl_pretrain", "trian"]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
    environment = {**os.environ, **ranks, "TORCHELASTIC_ERROR_FILE": str(files[0])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and done.stderr == ""
        and "No such command 'trian'" in files[0].read_text()
    )
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "No such command 'trian'" in done.stderr
