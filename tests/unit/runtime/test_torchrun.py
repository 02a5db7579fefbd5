"""Errors that workers record, and what torchrun prints with the plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lpl_pretrain.runtime import torchrun
from lpl_pretrain.runtime.torchrun import peer_failed, plugin, print_errors, record_error

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def files(tmp_path):
    """Error files of three ranks, where torchrun puts them."""
    for rank in range(3):
        (tmp_path / "attempt_0" / str(rank)).mkdir(parents=True)
    return [tmp_path / "attempt_0" / str(rank) / "error.json" for rank in range(3)]


def test_one_of_the_ranks_with_the_same_error_records_it(files):
    for file, text in zip(files, ("a: b", "a: c", "a: b")):
        record_error(text, file)
    assert [file.exists() for file in files] == [True, True, False]
    recorded = json.loads(files[0].read_text())
    assert recorded["message"]["extraInfo"]["py_callstack"] == recorded["lpl_pretrain"] == "a: b"


def test_torchrun_reads_the_recorded_error(files):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    record_error("ConfigError: x=1", files[1])
    failures = {rank: ProcessFailure(rank, 1, 2, str(file)) for rank, file in enumerate(files)}
    error = ChildFailedError("lpl_pretrain", failures)
    assert str(error).count("ConfigError: x=1") == 1 and error.get_first_failure()[0] == 1
    assert "ConfigError: x=1" in str(error).partition("Root Cause")[2]


def test_other_ranks_notice_a_recorded_error(files):
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
    "error, printed",
    [
        (ChildFailedError(None, "E: a", "E: a", "E: b"), "E: a\nE: b\n"),
        (SignalException("SIGINT"), ""),
        (ChildFailedError(None, None), "own report"),
        (ValueError("other"), "ValueError: other"),
    ],
)
def test_what_the_plugin_prints(capsys, error, printed):
    print_errors(type(error), error, None)
    output = capsys.readouterr().err
    assert printed in output and (output == printed or not printed.startswith("E: "))
    assert output or isinstance(error, SignalException)


@pytest.mark.parametrize(
    "arguments, active",
    [
        (["torchrun", "-m", "lpl_pretrain", "train"], True),
        (["torchrun", "--no-python", "bash", "-c", "cd x && lpl-pretrain train"], True),
        (["torchrun", "other.py"], False),
    ],
)
def test_the_plugin_is_inactive_for_other_programs(monkeypatch, arguments, active):
    before = sys.excepthook
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys, "excepthook", before)
    with pytest.raises(ValueError, match="omit the option"):
        plugin()()
    assert (sys.excepthook is torchrun.print_errors) == active


def test_a_usage_error_is_recorded_too(files):
    """Outside of torchrun, click prints its own errors."""
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
