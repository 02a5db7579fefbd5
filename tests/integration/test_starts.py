"""Repeated starts of one run: finished runs stay unchanged, refused starts leave no trace."""

from __future__ import annotations

import json
import shutil
import socket

import pytest

from tests.support.commands import folder_state, logged_losses, lpl, metric_lines


@pytest.fixture
def finished(world, tmp_path):
    shutil.copytree(world / "whole", tmp_path / "run", ignore=shutil.ignore_patterns("evaluations"))
    return tmp_path / "run"


@pytest.mark.parametrize(
    "ranks, changes, message",
    [
        (1, [], "complete: 8 of 8 steps; nothing to do (raise steps to go on)"),
        (
            1,
            ["steps=5", "lpl.chunk_size=2"],
            "complete: it has made 8 steps, and steps=5 asks for no more; nothing to do",
        ),
        (
            2,
            ["parallel.strategy=fsdp2"],
            "complete: 8 of 8 steps; nothing to do (raise steps to go on)",
        ),
        (
            1,
            ["inline_evaluation={world}/quick.yaml"],
            "steps 4, 8 have no score: `lpl-pretrain evaluate {run} {world}/quick.yaml`",
        ),
    ],
    ids=["same", "fewer steps", "another strategy under torchrun", "not scored"],
)
def test_a_finished_run_is_unchanged(world, finished, ranks, changes, message):
    """No content and no modification time of any file or folder changes."""
    before = folder_state(finished)
    changes = [change.format(world=world) for change in changes]
    done = lpl("train", world / "train.yaml", f"run_dir={finished}", *changes, ranks=ranks)
    assert done.stdout.count(message.format(world=world, run=finished)) == 1 and not done.stderr
    assert folder_state(finished) == before


def test_leftovers_of_a_killed_process_are_removed_from_a_finished_run(world, finished):
    before = folder_state(finished)
    holder = {
        "token": "of the killed",
        "job": "",
        "host": socket.gethostname(),
        "pid": 2**22 + 1,
        "since": 0.0,
    }
    (finished / "live.lease").write_text(json.dumps(holder))
    (finished / "checkpoints" / ".removing_step_00000004" / "part").mkdir(parents=True)
    lpl("train", world / "train.yaml", f"run_dir={finished}")
    after = folder_state(finished)
    for folder in (finished, finished / "checkpoints"):
        assert after.pop(folder) != before.pop(folder)
    assert after == before, "only the leftovers are gone"


def test_a_finished_run_continues_to_more_steps_and_records_the_start(world, finished):
    old = json.loads((finished / "provenance.json").read_text())[0]
    (finished / "provenance.json").write_text(
        json.dumps({key: old[key] for key in ("argv", "world_size", "git_diff", "versions")})
    )
    lpl(
        "train",
        world / "train.yaml",
        f"run_dir={finished}",
        "steps=10",
        "parallel.strategy=ddp",
        ranks=2,
    )
    assert max(logged_losses(finished)) == 10
    first, second = json.loads((finished / "provenance.json").read_text())
    assert set(first) == {"argv", "world_size", "git_diff", "versions"}, (
        "an older version's record is kept"
    )
    assert (second["step"], second["strategy"], second["world_size"]) == (8, "ddp", 2) and len(
        second["hosts"]
    ) == 1
    assert second["config_changes"] == {"parallel.strategy": ["local", "ddp"], "steps": [8, 10]} | {
        "run_dir": second["config_changes"]["run_dir"]
    }
    lpl("report", finished)
    page = (finished / "report.html").read_text()
    assert "resumed once" in page and "of 10" in page and "local&#34; → &#34;ddp" in page


def test_a_run_without_a_step_accepts_another_configuration(world, tmp_path):
    """The run was killed before its first step."""
    (started := tmp_path / "started").mkdir()
    shutil.copy(world / "whole" / "config.yaml", started)
    lpl(
        "train",
        world / "train.yaml",
        f"run_dir={started}",
        "lpl=null",
        "steps=2",
        "seed=3",
        "optimizer.lr=0.5",
    )
    assert "lr: 0.5" in (started / "config.yaml").read_text() and max(logged_losses(started)) == 2
    (start,) = json.loads((started / "provenance.json").read_text())
    assert start["config_changes"]["seed"] == [0, 3]
    shutil.rmtree(started / "checkpoints")
    refused = lpl(
        "train", world / "train.yaml", f"run_dir={started}", "lpl=null", "steps=2", check=False
    )
    assert refused.returncode == 2 and "seed: the run has 3, you ask for 0" in refused.stderr
    assert "logged steps under that configuration and saved no checkpoint" in refused.stderr
    same = ["lpl=null", "steps=2", "seed=3", "optimizer.lr=0.5"]
    lpl("train", world / "train.yaml", f"run_dir={started}", *same)
    assert [line["event"] for line in metric_lines(started) if "event" in line] == ["restarted"]


@pytest.fixture
def corrupt_shard(world, tmp_path):
    """A shard with one changed byte, detected only after the run's folder exists."""
    shutil.copytree(world / "latents", tmp_path / "latents")
    shard = sorted((tmp_path / "latents").glob("*.tar"))[0]
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    return shard


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_refused_first_start_leaves_nothing(world, corrupt_shard, tmp_path, ranks):
    changes = [
        f"run_dir={tmp_path}/a/run",
        f"data.folder={corrupt_shard.parent}",
        *["parallel.strategy=ddp"] * (ranks > 1),
    ]
    refused = lpl("train", world / "train.yaml", *changes, check=False, ranks=ranks)
    assert refused.returncode == (2 if ranks == 1 else 1) and corrupt_shard.name in refused.stderr
    assert refused.stderr.count("DataError: ") == 1
    assert list(tmp_path.iterdir()) == [corrupt_shard.parent]


def test_a_refused_start_of_a_run_changes_nothing(world, corrupt_shard, finished):
    before = {
        name: (finished / name).read_bytes()
        for name in ("config.yaml", "provenance.json", "metrics.jsonl")
    }
    refused = lpl(
        "train",
        world / "train.yaml",
        f"run_dir={finished}",
        "steps=12",
        f"data.folder={corrupt_shard.parent}",
        check=False,
    )
    assert refused.returncode == 2 and corrupt_shard.name in refused.stderr
    assert {name: (finished / name).read_bytes() for name in before} == before
