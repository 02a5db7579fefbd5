"""Files of a job."""

from __future__ import annotations

import json

from launch.job_folder import NO_RECORD, JobFolder
from lpl_pretrain.config.cluster import ClusterProfile
from lpl_pretrain.runtime.atomic import atomic_write_json


def test_exits_are_in_order_of_time(tmp_path):
    folder = JobFolder(tmp_path)
    for rank, status in ((3, 9), (0, 137)):
        folder.write_exit("7", 1, rank, status, "node1", stopped=False)
    folder.write_exit("7", 0, 1, 1, "node2", stopped=True)
    assert [rank_exit["rank"] for rank_exit in folder.exits("7", 1)] == [3, 0]


def test_record_is_plain_json(tmp_path):
    folder = JobFolder(tmp_path)
    folder.write_record({"job": "7", "profile": ClusterProfile().model_dump(mode="json")})
    assert json.loads(folder.record_file.read_text())["job"] == "7" and folder.read_attempts() == []


def test_wildcards_in_a_run_name_match_nothing_else(tmp_path):
    for name in ("a[1]*?", "a1x"):
        folder = JobFolder(tmp_path / name / "launch")
        folder.path.mkdir(parents=True)
        folder.write_exit("7", 0, len(name), 1, name, stopped=False)
        folder.stacks("7", 0, 0, name).touch()
    folder = JobFolder(tmp_path / "a[1]*?" / "launch")
    assert [rank_exit["host"] for rank_exit in folder.exits("7", 0)] == ["a[1]*?"]
    assert folder.silent_ranks("7", 0) == [{"rank": 0, "host": "a[1]*?"}]


def test_history_has_attempts_without_a_record(tmp_path):
    folder = JobFolder(tmp_path)
    for attempt in (1, 3):
        atomic_write_json(folder.rendezvous("7", attempt), {})
    for attempt, job in ((1, "7"), (2, "6")):
        folder.append_attempt(
            {"job": job, "attempt": attempt, "reason": "stopped in time", "requeued": True}
        )
    assert [attempt["reason"] for attempt in folder.history("7")] == [
        NO_RECORD,
        "stopped in time",
        NO_RECORD,
    ]
    assert folder.history("8") == folder.history(None) == []
