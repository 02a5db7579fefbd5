"""Which checkpoints stay, and in what order a checkpoint becomes one; on one process, under the local strategy."""

from __future__ import annotations

import json
import os

import pytest
import torch

from lpl_pretrain.checkpoint import manager as module
from lpl_pretrain.checkpoint.manager import CheckpointManager
from lpl_pretrain.checkpoint.manifest import Manifest, damage
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import CheckpointConfig
from lpl_pretrain.errors import CheckpointError, SaveError
from lpl_pretrain.evaluation.files import publish_json
from lpl_pretrain.runtime.lease import Lease
from lpl_pretrain.runtime.world import World
from tests.support.training import Case, Training


@pytest.fixture
def run():
    return Training(World(), torch.device("cpu"), Case(optimizer="adamw", precision="fp32", lr=0.01)).train(1)


def manager(folder, **options) -> CheckpointManager:
    return CheckpointManager(RunDir(folder), CheckpointConfig(**{"asynchronous": False, **options}))


@pytest.mark.parametrize(
    "options, kept",
    [
        ({"keep_last": 1}, [6]),
        ({"keep_last": 3}, [4, 5, 6]),
        ({"keep_last": 1, "keep_every_steps": 2}, [2, 4, 6]),
        ({"keep_last": 2, "keep_every_steps": 3}, [3, 5, 6]),
    ],
)
def test_retention(tmp_path, run, options, kept):
    keeper = manager(tmp_path, **options)
    for step in range(1, 7):
        keeper.save(step, run.strategy, run.ema, {}, samples_seen=step * 16)
    assert keeper.run_dir.complete_checkpoints() == kept
    assert sorted(path.name for path in keeper.run_dir.checkpoints.iterdir()) == [f"step_{step:08d}" for step in kept]


def test_a_rollback_finds_what_was_due(tmp_path, run):
    """Whatever stops left behind it, and however few are kept; what it undoes is removed, snapshots too."""
    config = CheckpointConfig(asynchronous=False, every_steps=4, keep_last=1)
    keeper = CheckpointManager(RunDir(tmp_path), config, keep_due=True)
    assert keeper.restore_latest(run.strategy, run.ema, only_due=True) is None
    for step in (3, 4, 5, 6):
        keeper.save(step, run.strategy, run.ema, {"step": step}, samples_seen=0)
    for step in (4, 6):
        keeper.save_snapshot(step, run.strategy, run.ema, {}, samples_seen=0)
    assert keeper.run_dir.complete_checkpoints() == [4, 6]
    assert keeper.restore_latest(run.strategy, run.ema) == {"step": 6}
    assert keeper.restore_latest(run.strategy, run.ema, only_due=True) == {"step": 4}
    keeper.discard_after(4, World())
    assert keeper.run_dir.complete_checkpoints() == keeper.run_dir.complete_snapshots() == [4]
    keeper.save(8, run.strategy, run.ema, {}, samples_seen=0)
    assert keeper.run_dir.complete_checkpoints() == [8]


def test_what_evaluation_needs_is_not_removed(tmp_path, run):
    """The best step by a protocol, and those that are being scored now; a dead evaluator's lease keeps nothing."""
    keeper = manager(tmp_path, keep_last=1)
    folder = keeper.run_dir
    publish_json(folder.best("quick"), {"step": 2})
    with Lease(folder.evaluation_lease(3, "quick")) as lease:
        assert lease.held
        dead = folder.evaluation_lease(4, "other")
        dead.parent.mkdir(parents=True)
        dead.write_text("{}")
        os.utime(dead, (0, 0))
        for step in range(1, 7):
            keeper.save(step, run.strategy, run.ema, {}, samples_seen=step * 16)
        assert folder.complete_checkpoints() == [2, 3, 6]
    keeper.save(7, run.strategy, run.ema, {}, samples_seen=7 * 16)
    assert folder.complete_checkpoints() == [2, 7]


def test_nothing_to_restore(tmp_path, run):
    assert manager(tmp_path).restore_latest(run.strategy, run.ema) is None


def test_files_and_manifest(tmp_path, run):
    folder = manager(tmp_path).save(12, run.strategy, run.ema, {"seed": 3}, samples_seen=12 * 16)
    assert {path.name for path in folder.iterdir()} == {"index.json", "manifest.json", "pieces_00000.safetensors", "state.json"}
    manifest = Manifest.read(folder)
    assert (manifest.step, manifest.samples_seen, manifest.optimizer_steps, manifest.world_size, manifest.format) == (
        12,
        192,
        1,
        1,
        2,
    )
    assert json.loads((folder / "state.json").read_text()) == {"seed": 3}
    assert damage(folder) is None


def test_saving_a_step_again_replaces_it(tmp_path, run):
    keeper = manager(tmp_path)
    keeper.save(1, run.strategy, run.ema, {"try": 1}, samples_seen=16)
    run.train(1)
    keeper.save(1, run.strategy, run.ema, {"try": 2}, samples_seen=16)
    wanted = [piece.tensor.clone() for piece in run.strategy.local_params()]
    run.train(1)
    assert keeper.restore_latest(run.strategy, run.ema) == {"try": 2}
    assert all(torch.equal(a.tensor, b) for a, b in zip(run.strategy.local_params(), wanted, strict=True))
    assert run.strategy.optimizer_steps == 2


def test_leftovers_are_swept(tmp_path, run):
    keeper = manager(tmp_path)
    for name in (".writing_step_00000009", ".removing_step_00000003"):
        (keeper.run_dir.checkpoints / name).mkdir(parents=True)
        (keeper.run_dir.checkpoints / name / "manifest.json").write_text("{}")
    assert keeper.restore_latest(run.strategy, run.ema) is None
    assert not list(keeper.run_dir.checkpoints.iterdir())


def test_manifest_is_the_last_file_and_rename_the_last_act(tmp_path, run, monkeypatch):
    """An error before that leaves no checkpoint and takes no space; it is not the input's fault: trying again may help."""
    keeper = manager(tmp_path)

    def crash(*args):
        raise OSError("pulled the plug")

    monkeypatch.setattr(module, "merge_parts", crash)
    with pytest.raises(CheckpointError, match="step_00000001: cannot be published: OSError: pulled the plug"):
        keeper.save(1, run.strategy, run.ema, {}, samples_seen=16)
    assert not list(keeper.run_dir.checkpoints.iterdir())
    monkeypatch.undo()
    there = []
    monkeypatch.setattr(Manifest, "write", lambda self, folder: crash(there.extend(path.name for path in folder.iterdir())))
    with pytest.raises(SaveError, match="pulled the plug") as caught:
        keeper.save(1, run.strategy, run.ema, {}, samples_seen=16)
    assert sorted(there) == ["index.json", "pieces_00000.safetensors", "state.json"]
    assert not list(keeper.run_dir.checkpoints.iterdir())
    monkeypatch.setattr(CheckpointManager, "_start", crash)
    with pytest.raises(SaveError, match="step_00000001_.*: cannot be made: OSError: pulled the plug"):
        keeper.save(1, run.strategy, run.ema, {}, samples_seen=16)
    assert caught.value.status == 1


class Ended(Exception):
    """Stands for the end of a process."""


def end():
    raise Ended


def test_a_process_whose_run_is_another_ones_sweeps_and_publishes_nothing(tmp_path, run, monkeypatch):
    """It learns of it before a save, or at the very end of one."""
    heir, ghost = manager(tmp_path), manager(tmp_path)
    heir.save(1, run.strategy, run.ema, {"of": "the heir"}, samples_seen=16)
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", lambda *args, real=Manifest.write: (real(*args), setattr(ghost, "fence", end)))
        with pytest.raises(CheckpointError, match="step_00000001: cannot be published: Ended"):
            ghost.save(1, run.strategy, run.ema, {"of": "a ghost"}, samples_seen=16)
    under_way = heir.run_dir.checkpoints / ".writing_step_00000002_0123abcd"
    under_way.mkdir()
    with pytest.raises(CheckpointError, match="Ended"):
        ghost.save(1, run.strategy, run.ema, {"of": "a ghost"}, samples_seen=16)
    assert under_way.is_dir() and heir.restore_latest(run.strategy, run.ema) == {"of": "the heir"}


def test_who_was_succeeded_does_not_write_where_its_heir_does(tmp_path, run):
    """It was suspended in between; the heir has swept up after it, and writes a checkpoint of the same step."""
    names = []
    for keeper in (manager(tmp_path), manager(tmp_path)):
        keeper.fence = lambda: names.append([path.name for path in tmp_path.glob("checkpoints/.writing_*")])
        keeper.save(1, run.strategy, run.ema, {}, samples_seen=16)
    (first,), (second,) = (found for found in names if found)
    assert first != second


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda folder: (folder / "pieces_00000.safetensors").write_bytes(b"short"), "5 bytes, the manifest says"),
        (lambda folder: (folder / "index.json").unlink(), "No such file"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 2, "files": {}}'), "TypeError"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "TypeError"),
    ],
)
def test_damage_is_named(tmp_path, run, harm, words):
    folder = manager(tmp_path).save(1, run.strategy, run.ema, {}, samples_seen=16)
    harm(folder)
    assert words in damage(folder)


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path, run):
    """Someone has copied it from another run."""
    CheckpointManager(RunDir(tmp_path), CheckpointConfig(asynchronous=False), "aaaa").save(
        1, run.strategy, run.ema, {}, samples_seen=16
    )
    with pytest.raises(CheckpointError, match="saved by a run with another configuration \\(aaaa, this one is bbbb\\)"):
        CheckpointManager(RunDir(tmp_path), CheckpointConfig(), "bbbb").restore_latest(run.strategy, run.ema)


def test_an_older_format_is_refused(tmp_path, run):
    folder = manager(tmp_path).save(1, run.strategy, run.ema, {}, samples_seen=16)
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**content, "format": 1}))
    with pytest.raises(CheckpointError, match="checkpoint format 1, this version reads 2: go on with the version that saved it"):
        manager(tmp_path).restore_latest(run.strategy, run.ema)
