"""metrics.jsonl: whole lines, by one process at a time."""

from __future__ import annotations

import json
import os

import pytest

from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.trackers.build import Trackers
from lpl_pretrain.trackers.jsonl import JsonlTracker
from tests.support.configs import train_config


@pytest.mark.parametrize(
    "before, kept", [("", 0), ('{"step": 1}\n', 1), ('{"step": 1}\n{"step": 2, "lo', 2)]
)
def test_a_line_that_was_cut_short_does_not_spoil_the_next_one(tmp_path, before, kept):
    """A kill or a full disk can leave the last line incomplete."""
    (tmp_path / "metrics.jsonl").write_text(before)
    trackers = Trackers(RunDir(tmp_path), train_config(), 0)
    trackers.event("resumed", 1)
    trackers.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.startswith(before) and len(text.splitlines()) == kept + 1
    assert json.loads(text.splitlines()[-1])["event"] == "resumed"


def test_who_has_lost_the_run_writes_no_line(tmp_path):
    def end():
        raise SystemExit

    trackers = Trackers(RunDir(tmp_path), train_config(), 0, end)
    with pytest.raises(SystemExit):
        trackers.metrics(1, {})
    trackers.close()
    assert not (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="/dev/full, a disk that is always full, is Linux's"
)
def test_a_line_that_is_refused_when_the_file_is_closed_names_the_file(tmp_path):
    tracker = JsonlTracker(RunDir(tmp_path).metrics)
    tracker.file.close()
    tracker.file = open("/dev/full", "a")  # noqa: SIM115
    tracker.file.write("a line")
    with pytest.raises(OSError) as error:
        tracker.close()
    assert error.value.filename == str(RunDir(tmp_path).metrics)
