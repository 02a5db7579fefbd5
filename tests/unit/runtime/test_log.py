"""The log of a rank: made when there is something to write; a disk that refuses a line does not end
the training.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lpl_pretrain.runtime.log import log, set_up_logging


@pytest.fixture(autouse=True)
def handlers():
    before = log.handlers[:], log.propagate, log.level
    yield
    log.handlers[:], log.propagate, log.level = before


def test_a_rank_writes_a_file_of_its_own(tmp_path, capfd):
    file = tmp_path / "logs" / "rank_00001.log"
    set_up_logging(1, file)
    assert not file.parent.exists()
    log.info("begun")
    assert "INFO begun" in file.read_text() and capfd.readouterr().err == ""


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="/dev/full, a disk that is always full, is Linux's"
)
def test_a_full_disk_is_one_line(tmp_path, capfd):
    set_up_logging(1, Path("/dev/full"))
    log.info("first")
    log.info("second")
    assert (
        capfd.readouterr().err
        == "StorageError: /dev/full: No space left on device: lines of the log are lost\n"
    )


def test_a_line_that_cannot_be_formatted_is_our_mistake(tmp_path, capfd):
    set_up_logging(1, tmp_path / "log")
    assert logging.raiseExceptions
    log.info("%d", "no number")
    assert "Traceback" not in capfd.readouterr().out and not (tmp_path / "log").read_text()
