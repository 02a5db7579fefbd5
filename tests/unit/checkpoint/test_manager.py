"""Which checkpoints stay, and in what order a checkpoint becomes one; on one process, under the
local strategy.
"""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from lpl_pretrain.checkpoint import manager as module
from lpl_pretrain.checkpoint.manager import CheckpointManager
from lpl_pretrain.checkpoint.manifest import Manifest
from lpl_pretrain.checkpoint.verify import damage
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import CheckpointConfig
from lpl_pretrain.errors import CheckpointError, DamagedCheckpointError, SaveError, exit_status
from lpl_pretrain.runtime.atomic import atomic_write_json
from lpl_pretrain.runtime.lease import Lease
from lpl_pretrain.runtime.world import World
from tests.support.checkpoints import edit
from tests.support.training import Case, Training


@pytest.fixture(autouse=True)
def heard(monkeypatch):
    """By caplog, whatever a command in this process has set up before."""
    monkeypatch.setattr(module.log, "propagate", True)


@pytest.fixture
def run():
    return Training(
        World(), torch.device("cpu"), Case(optimizer="adamw", precision="fp32", lr=0.01)
    ).train(1)


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
    assert sorted(path.name for path in keeper.run_dir.checkpoints.iterdir()) == [
        f"step_{step:08d}" for step in kept
    ]


def test_a_rollback_finds_what_was_due(tmp_path, run):
    """Whatever stops left behind it, and however few are kept; what it undoes is removed, snapshots
    too.
    """
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


def test_a_rollback_goes_to_no_older_checkpoint_for_a_reason_that_may_pass(
    tmp_path, run, monkeypatch
):
    """It would go on with other samples than a run that no disk disturbed.  A damaged one is passed
    over, as on a resume.
    """
    keeper = CheckpointManager(
        RunDir(tmp_path), CheckpointConfig(asynchronous=False, every_steps=2), keep_due=True
    )
    for step in (2, 4):
        keeper.save(step, run.strategy, run.ema, {"step": step}, samples_seen=0)
    real = module.open_checkpoint

    def refused(folder, **options):
        if folder.name.endswith("4"):
            raise DamagedCheckpointError(f"{folder}/index.json: {reason}")
        return real(folder, **options)

    monkeypatch.setattr(module, "open_checkpoint", refused)
    reason = "Input/output error"
    with pytest.raises(
        CheckpointError, match="step_00000004/index.json: Input/output error: the same command"
    ) as error:
        keeper.restore_latest(run.strategy, run.ema, only_due=True)
    assert exit_status(error.value) == 1
    assert keeper.restore_latest(run.strategy, run.ema) == {"step": 2}
    reason = "its sha256 is not the manifest's"
    assert keeper.restore_latest(run.strategy, run.ema, only_due=True) == {"step": 2}


def test_what_evaluation_needs_is_not_removed(tmp_path, run):
    """The best step by a protocol, and those that are being scored now; a dead evaluator's lease
    keeps nothing.
    """
    keeper = manager(tmp_path, keep_last=1)
    folder = keeper.run_dir
    best = {"metric": "fid", "value": 3.0, "weights": "ema", "guidance_scale": 1.0}
    atomic_write_json(folder.best("quick"), {"step": 2, **best})
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
    assert {path.name for path in folder.iterdir()} == {
        "index.json",
        "manifest.json",
        "pieces_00000.safetensors",
        "state.json",
    }
    manifest = Manifest.read(folder)
    assert (
        manifest.step,
        manifest.samples_seen,
        manifest.optimizer_steps,
        manifest.world_size,
        manifest.format,
    ) == (
        12,
        192,
        1,
        1,
        3,
    )
    assert json.loads((folder / "state.json").read_text()) == {"seed": 3}
    assert damage(folder) is None


def test_saving_a_step_again_replaces_it(tmp_path, run):
    keeper = manager(tmp_path)
    keeper.save(2, run.strategy, run.ema, {"try": 1}, samples_seen=16)
    run.train(1)
    keeper.save(2, run.strategy, run.ema, {"try": 2}, samples_seen=16)
    wanted = [piece.tensor.clone() for piece in run.strategy.local_params()]
    run.train(1)
    assert keeper.restore_latest(run.strategy, run.ema) == {"try": 2}
    assert all(
        torch.equal(a.tensor, b) for a, b in zip(run.strategy.local_params(), wanted, strict=True)
    )
    assert run.strategy.optimizer_steps == 2


def test_leftovers_are_swept(tmp_path, run):
    keeper = manager(tmp_path)
    for name in (".writing_step_00000009", ".removing_step_00000003"):
        (keeper.run_dir.checkpoints / name).mkdir(parents=True)
        (keeper.run_dir.checkpoints / name / "manifest.json").write_text("{}")
    assert keeper.restore_latest(run.strategy, run.ema) is None
    assert not list(keeper.run_dir.checkpoints.iterdir())


def test_manifest_is_the_last_file_and_rename_the_last_act(tmp_path, run, monkeypatch):
    """An error before that leaves no checkpoint and takes no space; it is not the input's fault:
    trying again may help.
    """
    keeper = manager(tmp_path)

    def crash(*args):
        raise OSError("pulled the plug")

    monkeypatch.setattr(module, "merge_parts", crash)
    with pytest.raises(
        CheckpointError, match="step_00000001: cannot be published: OSError: pulled the plug"
    ):
        keeper.save(1, run.strategy, run.ema, {}, samples_seen=16)
    assert not list(keeper.run_dir.checkpoints.iterdir())
    monkeypatch.undo()
    there = []
    monkeypatch.setattr(
        Manifest,
        "write",
        lambda self, folder: crash(there.extend(path.name for path in folder.iterdir())),
    )
    with pytest.raises(SaveError, match="pulled the plug") as caught:
        keeper.save(1, run.strategy, run.ema, {}, samples_seen=16)
    assert sorted(there) == ["index.json", "pieces_00000.safetensors", "state.json"]
    assert not list(keeper.run_dir.checkpoints.iterdir())
    monkeypatch.setattr(CheckpointManager, "_start", crash)
    with pytest.raises(
        SaveError, match="step_00000001_.*: cannot be made: OSError: pulled the plug"
    ):
        keeper.save(1, run.strategy, run.ema, {}, samples_seen=16)
    assert caught.value.status == 1


class Ended(Exception):
    """Stands for the end of a process."""


def end():
    raise Ended


def test_a_process_whose_run_is_another_ones_sweeps_and_publishes_nothing(
    tmp_path, run, monkeypatch
):
    """It learns of it before a save, or at the very end of one."""
    heir, ghost = manager(tmp_path), manager(tmp_path)
    heir.save(1, run.strategy, run.ema, {"of": "the heir"}, samples_seen=16)
    with monkeypatch.context() as patch:
        patch.setattr(
            Manifest,
            "write",
            lambda *args, real=Manifest.write: (
                real(*args),
                setattr(ghost, "check_ownership", end),
            ),
        )
        with pytest.raises(CheckpointError, match="step_00000001: cannot be published: Ended"):
            ghost.save(1, run.strategy, run.ema, {"of": "a ghost"}, samples_seen=16)
    under_way = heir.run_dir.checkpoints / ".writing_step_00000002_0123abcd"
    under_way.mkdir()
    with pytest.raises(CheckpointError, match="Ended"):
        ghost.save(1, run.strategy, run.ema, {"of": "a ghost"}, samples_seen=16)
    assert under_way.is_dir() and heir.restore_latest(run.strategy, run.ema) == {"of": "the heir"}


def test_who_was_succeeded_does_not_write_where_its_heir_does(tmp_path, run):
    """It was suspended in between; the heir has swept up after it, and writes a checkpoint of the
    same step.
    """
    names = []
    for keeper in (manager(tmp_path), manager(tmp_path)):
        keeper.check_ownership = lambda: names.append(
            [path.name for path in tmp_path.glob("checkpoints/.writing_*")]
        )
        keeper.save(1, run.strategy, run.ema, {}, samples_seen=16)
    (first,), (second,) = (found for found in names if found)
    assert first != second


@pytest.mark.parametrize(
    "harm, words",
    [
        (
            lambda folder: (folder / "pieces_00000.safetensors").write_bytes(b"short"),
            "5 bytes, the manifest says",
        ),
        (lambda folder: (folder / "index.json").unlink(), "No such file"),
        (
            lambda folder: (folder / "manifest.json").write_text('{"format": 2, "files": {}}'),
            "manifest.json: has no identity",
        ),
        (
            lambda folder: (folder / "manifest.json").write_text("[]"),
            "manifest.json: found [], wanted an object",
        ),
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
    with pytest.raises(
        CheckpointError,
        match="saved by a run with another configuration \\(aaaa, this one is bbbb\\)",
    ):
        CheckpointManager(RunDir(tmp_path), CheckpointConfig(), "bbbb").restore_latest(
            run.strategy, run.ema
        )


def test_an_older_format_is_refused(tmp_path, run):
    folder = manager(tmp_path).save(1, run.strategy, run.ema, {}, samples_seen=16)
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**content, "format": 1}))
    with pytest.raises(
        CheckpointError,
        match="checkpoint format 1, this version reads 2 and 3: go on with the version "
        "that saved it",
    ):
        manager(tmp_path).restore_latest(run.strategy, run.ema)


def saved(folder, run, *steps, **options):
    keeper = manager(folder, **{"keep_last": 9, **options})
    for step in steps:
        keeper.save(step, run.strategy, run.ema, {"step": step}, samples_seen=step * 16)
    return keeper


def test_resuming_passes_over_what_is_damaged(tmp_path, run, caplog):
    """A renamed folder, and an index that was edited with all its digests; when none is left
    nothing is begun.
    """
    keeper = saved(tmp_path, run, 1, 2, 3)
    keeper.run_dir.checkpoint(3).rename(keeper.run_dir.checkpoint(7))
    edit(keeper.run_dir.checkpoint(2), "index.json", lambda index: index.pop("ema") and None)
    (keeper.run_dir.checkpoints / "step_00000009").mkdir()
    assert keeper.restore_latest(run.strategy, run.ema) == {"step": 1}
    for words in (
        "step_00000009: is no complete checkpoint",
        "step_00000007: passed over",
        "step_00000002: passed over",
    ):
        assert words in caplog.text
    edit(
        keeper.run_dir.checkpoint(1),
        "manifest.json",
        lambda content: content.update(optimizer_steps=-1),
    )
    with pytest.raises(CheckpointError, match="all 3 checkpoints are damaged"):
        keeper.restore_latest(run.strategy, run.ema)


@pytest.mark.parametrize("name", ["step_00000001", "step_1", "step_00000001_old"])
def test_a_run_does_not_begin_again_beside_what_was_a_checkpoint(tmp_path, run, name):
    keeper = saved(tmp_path, run, 1)
    folder = keeper.run_dir.checkpoint(1)
    if name == folder.name:
        (folder / "manifest.json").unlink()
    folder.rename(folder.with_name(name))
    with pytest.raises(
        CheckpointError, match=f"holds {name} and no complete checkpoint: bring one back, or remove"
    ):
        keeper.restore_latest(run.strategy, run.ema)


def test_a_training_run_wants_all_of_its_state(tmp_path, run):
    keeper = saved(tmp_path, run, 1)
    assert keeper.restore_latest(run.strategy, run.ema) == {"step": 1}
    keeper.samples_per_step = 16
    with pytest.raises(CheckpointError, match="all 1 checkpoints are damaged"):
        keeper.restore_latest(run.strategy, run.ema)


def test_damaged_checkpoints_do_not_displace_sound_ones(tmp_path, run):
    """Cut after it was written, found damaged when the run was resumed, and copied under a step of
    the far future.
    """
    keeper = saved(tmp_path, run, 1, 2, 3, 4)
    folder = keeper.run_dir
    flip(folder.checkpoint(4) / "pieces_00000.safetensors")
    (folder.checkpoint(3) / "state.json").write_text("")
    shutil.copytree(folder.checkpoint(1), folder.checkpoint(99))
    keeper = manager(tmp_path, keep_last=2)
    assert keeper.restore_latest(run.strategy, run.ema) == {"step": 2}
    keeper.save(5, run.strategy, run.ema, {"step": 5}, samples_seen=80)
    assert folder.complete_checkpoints() == [2, 3, 4, 5, 99]
    keeper.save(4, run.strategy, run.ema, {"step": 4}, samples_seen=64)
    assert folder.complete_checkpoints() == [4, 5, 99], "it was saved again, and counts again"
    assert keeper.restore_latest(run.strategy, run.ema) == {"step": 5}


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_linked_checkpoint_is_removed_as_a_link(tmp_path, run):
    keeper = saved(tmp_path / "run", run, 1, 2)
    first, elsewhere = keeper.run_dir.checkpoint(1), tmp_path / "elsewhere" / "step_00000001"
    elsewhere.parent.mkdir()
    first.rename(elsewhere)
    first.symlink_to(elsewhere)
    saved(tmp_path / "run", run, 3, keep_last=1)
    assert keeper.run_dir.complete_checkpoints() == [3] and damage(elsewhere) is None
    assert [path.name for path in keeper.run_dir.checkpoints.iterdir()] == ["step_00000003"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"step": "2"}', '{"step": -1}', "null", '{"metric": "fid"}']
)
def test_a_damaged_best_file_fails_no_save(tmp_path, run, caplog, content):
    """It is named; the records say which step it was, and nothing else is kept where they do not."""
    folder = RunDir(tmp_path)
    entry = {"metric": "fid", "weights": "ema", "guidance_scale": 1.0}
    for step, value in ((1, 5.0), (2, 3.0), (3, 4.0)):
        record = {"format_version": 2, "step": step, "protocol": {"name": "quick", "best": "fid"}}
        atomic_write_json(
            folder.evaluation(step, "quick"), {**record, "results": [{**entry, "value": value}]}
        )
    folder.best("quick").write_text(content)
    saved(tmp_path, run, 1, 2, 3, 4, 5, keep_last=1)
    assert folder.complete_checkpoints() == [2, 5]
    assert (
        "evaluations/best_quick.json: " in caplog.text and "the records say step 2" in caplog.text
    )
    shutil.rmtree(folder.evaluation(1, "quick").parent.parent)
    folder.best("quick").parent.mkdir()
    folder.best("quick").write_text(content)
    saved(tmp_path, run, 6, keep_last=1)
    assert folder.complete_checkpoints() == [6] and "no record names the best step" in caplog.text


def test_a_best_file_that_its_record_contradicts_is_damaged(tmp_path, run, caplog):
    folder = RunDir(tmp_path)
    entry = {"metric": "fid", "weights": "ema", "guidance_scale": 1.0}
    for step, value in ((1, 3.0), (2, 5.0)):
        record = {"format_version": 2, "step": step, "protocol": {"name": "quick", "best": "fid"}}
        atomic_write_json(
            folder.evaluation(step, "quick"), {**record, "results": [{**entry, "value": value}]}
        )
    atomic_write_json(folder.best("quick"), {"step": 2, **entry, "value": 3.0})
    saved(tmp_path, run, 1, 2, 3, keep_last=1)
    assert folder.complete_checkpoints() == [1, 3] and "fid=3 of step 2 is not what" in caplog.text


def test_things_in_the_place_of_leases_fail_no_save(tmp_path, run):
    folder = RunDir(tmp_path)
    folder.evaluation_lease(1, "a").mkdir(parents=True)
    folder.evaluation_lease(1, "b").write_text("")
    folder.evaluation_lease(1, "c").symlink_to("nowhere")
    saved(tmp_path, run, 1, 2, keep_last=1)
    assert folder.complete_checkpoints() == [2]
