"""Log file of a rank: it is created at the first line, and a line that cannot be written does not
end training.
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


def test_each_rank_writes_its_own_file(tmp_path, capfd):
    file = tmp_path / "logs" / "rank_00001.log"
    set_up_logging(1, file)
    assert not file.parent.exists()
    log.info("begun")
    assert "INFO begun" in file.read_text() and capfd.readouterr().err == ""


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="only Linux has /dev/full, a disk that is always full"
)
def test_a_full_disk_is_reported_once(tmp_path, capfd):
    set_up_logging(1, Path("/dev/full"))
    log.info("first")
    log.info("second")
    assert (
        capfd.readouterr().err
        == "StorageError: /dev/full: No space left on device: lines of the log are lost\n"
    )


def test_a_formatting_error_is_not_a_storage_error(tmp_path, capfd):
    set_up_logging(1, tmp_path / "log")
    assert logging.raiseExceptions
    log.info("%d", "no number")
    assert "Traceback" not in capfd.readouterr().out and not (tmp_path / "log").read_text()
