"""provenance.json: a list of starts, whatever lay there before."""

from __future__ import annotations

import json

import pytest

from lpl_pretrain.runtime import atomic
from lpl_pretrain.trainer.provenance import append, describe
from tests.support.configs import dataset_index, train_config


def start(step, diff="d"):
    return {"step": step, "git_diff": diff}


def test_starts_are_added_and_a_diff_is_kept_once(tmp_path):
    path = tmp_path / "provenance.json"
    for step, diff in enumerate(["d", "d", None, "d"]):
        append(path, start(step, diff))
    assert json.loads(path.read_text()) == [start(0), {"step": 1}, start(2, None), start(3)]


def test_what_an_older_version_wrote_is_the_first_start(tmp_path):
    path = tmp_path / "provenance.json"
    path.write_text(json.dumps(old := {"argv": ["x"], "world_size": 2, "git_diff": "d"}))
    append(path, start(8))
    assert json.loads(path.read_text()) == [old, {"step": 8}]


@pytest.mark.parametrize("content", ['[{"step": 0', "3", "\\xff"])
def test_an_unreadable_file_is_moved_aside(tmp_path, content):
    path = tmp_path / "provenance.json"
    path.write_bytes(content.encode().decode("unicode_escape").encode("latin-1"))
    append(path, start(1))
    assert json.loads(path.read_text()) == [start(1)]
    (aside,) = tmp_path.glob("provenance.unreadable.*.json")
    assert aside.read_bytes() == content.encode().decode("unicode_escape").encode("latin-1")


def test_a_kill_during_a_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "provenance.json"
    append(path, start(0))

    def killed(*_):
        raise SystemExit

    monkeypatch.setattr(atomic.os, "replace", killed)
    with pytest.raises(SystemExit):
        append(path, start(1))
    assert json.loads(path.read_text()) == [start(0)] and [
        found.name for found in tmp_path.iterdir()
    ] == [path.name]


def test_a_start_records_world_size_hosts_and_strategy():
    found = describe(
        train_config(parallel__strategy="ddp"),
        dataset_index(),
        step=3,
        hosts=["a", "a", "b"],
        device="cpu",
        changes={"steps": (1, 2)},
    )
    assert (found["step"], found["world_size"], found["hosts"], found["strategy"]) == (
        3,
        3,
        ["a", "b"],
        "ddp",
    )
    assert (
        found["versions"]["torch"]
        and len(found["code"]) == 64
        and json.loads(json.dumps(found))["config_changes"] == {"steps": [1, 2]}
    )
