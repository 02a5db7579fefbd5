"""Status and logs."""

from __future__ import annotations

import json
import time

import pytest

from launch.job_folder import JobFolder
from launch.monitor import format_failure, new_lines, status_report


def test_logs_of_all_ranks_are_merged(tmp_path):
    (tmp_path / "7_0_log.out").write_text("one\ntw")
    (tmp_path / "7_1_log.err").write_text("eins\n")
    (tmp_path / "8_0_log.out").write_text("another job\n")
    read = {}
    assert list(new_lines(tmp_path, "7", read)) == ["[0] one", "[1] eins"]
    with (tmp_path / "7_0_log.out").open("a") as file:
        file.write("o\n")
    assert list(new_lines(tmp_path, "7", read)) == ["[0] two"]


def test_logs_of_an_array_task(tmp_path):
    for name in ("4711_1_0_log.out", "4711_1_12_log.err", "4711_11_0_log.out", "4711_0_0_log.out"):
        (tmp_path / name).write_text(f"{name}\n")
    assert list(new_lines(tmp_path, "4711_1", {})) == [
        "[0] 4711_1_0_log.out",
        "[12] 4711_1_12_log.err",
    ]


def test_failure_names_the_rank_and_its_node():
    known = {"job": "7", "attempt": 2}
    assert (
        format_failure({**known, "rank": 1, "host": "n1"}) == " (rank 1 on n1)"
        and format_failure(known) == ""
    )
    expected = " (silent: rank 3 on n2; stacks: launch/stacks_7_2_*.txt)"
    assert format_failure({**known, "silent_ranks": [{"rank": 3, "host": "n2"}]}) == expected
    assert "silent: none" in format_failure({**known, "silent_ranks": []})


@pytest.mark.parametrize(("age_s", "expected"), [(180, True), (3600, False)])
def test_recent_straggler_is_shown(tmp_path, age_s, expected):
    folder = JobFolder(tmp_path / "launch")
    folder.path.mkdir()
    folder.write_record({"job": None, "nodes": 1, "argv": ["train"], "profile": {"exclude": []}})
    slow = [
        {"event": "straggler", "rank": rank, "host": "n1", "measure": "data", "times": 2.5}
        for rank in (1, 3)
    ]
    lines = [
        {"step": 4, "time_s": time.time() - age_s, **line}
        for line in (*slow, {"event": "resumed"}, {})
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join(map(json.dumps, lines)) + '\n{"step": 5, "tim'
    )
    shown = status_report(tmp_path)
    assert (
        "straggler   rank 3 on n1: 2.5 times the median in `data`, 3 min ago" in shown
    ) is expected
    assert "rank 1" not in shown and "step        4" in shown
