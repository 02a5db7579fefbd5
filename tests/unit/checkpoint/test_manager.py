"""Saving, retention and restoring of checkpoints on one process, under the local strategy."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from lpl_pretrain.checkpoint import manager as manager_module
from lpl_pretrain.checkpoint import restore as restore_module
from lpl_pretrain.checkpoint.manager import CheckpointManager
from lpl_pretrain.checkpoint.manifest import Manifest
from lpl_pretrain.checkpoint.verify import find_corruption
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import CheckpointConfig
from lpl_pretrain.errors import CheckpointError, DamagedCheckpointError, SaveError, exit_status
from lpl_pretrain.runtime.atomic import atomic_write_json
from lpl_pretrain.runtime.lease import Lease
from lpl_pretrain.runtime.world import World
from tests.support.checkpoints import edit
from tests.support.training import Case, Training


@pytest.fixture(autouse=True)
def propagate_log(monkeypatch):
    """Lets caplog capture the log, whatever a command in this process has set up before."""
    monkeypatch.setattr(manager_module.log, "propagate", True)


@pytest.fixture
def run():
    return Training(
        World(), torch.device("cpu"), Case(optimizer="adamw", precision="fp32", lr=0.01)
    ).train(1)


def make_manager(folder, **options) -> CheckpointManager:
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
def test_keep_last_and_keep_every_steps(tmp_path, run, options, kept):
    manager = make_manager(tmp_path, **options)
    for step in range(1, 7):
        manager.save(step, run.strategy, run.ema, {}, samples_seen=step * 16)
    assert manager.run_dir.complete_checkpoints() == kept
    assert sorted(path.name for path in manager.run_dir.checkpoints.iterdir()) == [
        f"step_{step:08d}" for step in kept
    ]


def test_a_rollback_goes_to_a_multiple_of_every_steps(tmp_path, run):
    """Even with `keep_last=1` and newer checkpoints from early stops.  Later checkpoints and
    snapshots are removed.
    """
    config = CheckpointConfig(asynchronous=False, every_steps=4, keep_last=1)
    manager = CheckpointManager(RunDir(tmp_path), config, keep_due=True)
    assert manager.restore_latest(run.strategy, run.ema, only_due=True) is None
    for step in (3, 4, 5, 6):
        manager.save(step, run.strategy, run.ema, {"step": step}, samples_seen=0)
    for step in (4, 6):
        manager.save_snapshot(step, run.strategy, run.ema, {}, samples_seen=0)
    assert manager.run_dir.complete_checkpoints() == [4, 6]
    assert manager.restore_latest(run.strategy, run.ema) == {"step": 6}
    assert manager.restore_latest(run.strategy, run.ema, only_due=True) == {"step": 4}
    manager.discard_after(4, World())
    assert manager.run_dir.complete_checkpoints() == manager.run_dir.complete_snapshots() == [4]
    manager.save(8, run.strategy, run.ema, {}, samples_seen=0)
    assert manager.run_dir.complete_checkpoints() == [8]


def test_a_rollback_raises_a_transient_error_instead_of_going_further_back(
    tmp_path, run, monkeypatch
):
    """A rollback to an older checkpoint would train on other samples than a run without the error.
    A damaged checkpoint is skipped, as on a resume.
    """
    manager = CheckpointManager(
        RunDir(tmp_path), CheckpointConfig(asynchronous=False, every_steps=2), keep_due=True
    )
    for step in (2, 4):
        manager.save(step, run.strategy, run.ema, {"step": step}, samples_seen=0)
    real = restore_module.open_checkpoint

    def refused(folder, **options):
        if folder.name.endswith("4"):
            raise DamagedCheckpointError(f"{folder}/index.json: {reason}")
        return real(folder, **options)

    monkeypatch.setattr(restore_module, "open_checkpoint", refused)
    reason = "Input/output error"
    with pytest.raises(
        CheckpointError, match="step_00000004/index.json: Input/output error: the same command"
    ) as error:
        manager.restore_latest(run.strategy, run.ema, only_due=True)
    assert exit_status(error.value) == 1
    assert manager.restore_latest(run.strategy, run.ema) == {"step": 2}
    reason = "its sha256 is not the manifest's"
    assert manager.restore_latest(run.strategy, run.ema, only_due=True) == {"step": 2}


def test_checkpoints_that_evaluation_needs_are_kept(tmp_path, run):
    """The best step by a protocol, and the steps that are being scored; a dead evaluator's lease
    protects nothing.
    """
    manager = make_manager(tmp_path, keep_last=1)
    folder = manager.run_dir
    best = {"metric": "fid", "value": 3.0, "weights": "ema", "guidance_scale": 1.0}
    atomic_write_json(folder.best("quick"), {"step": 2, **best})
    with Lease(folder.evaluation_lease(3, "quick")) as lease:
        assert lease.held
        dead = folder.evaluation_lease(4, "other")
        dead.parent.mkdir(parents=True)
        dead.write_text("{}")
        os.utime(dead, (0, 0))
        for step in range(1, 7):
            manager.save(step, run.strategy, run.ema, {}, samples_seen=step * 16)
        assert folder.complete_checkpoints() == [2, 3, 6]
    manager.save(7, run.strategy, run.ema, {}, samples_seen=7 * 16)
    assert folder.complete_checkpoints() == [2, 7]


def test_without_a_checkpoint_nothing_is_restored(tmp_path, run):
    assert make_manager(tmp_path).restore_latest(run.strategy, run.ema) is None


def test_files_and_manifest(tmp_path, run):
    folder = make_manager(tmp_path).save(
        12, run.strategy, run.ema, {"seed": 3}, samples_seen=12 * 16
    )
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
    assert find_corruption(folder) is None


def test_saving_a_step_again_replaces_it(tmp_path, run):
    manager = make_manager(tmp_path)
    manager.save(2, run.strategy, run.ema, {"try": 1}, samples_seen=16)
    run.train(1)
    manager.save(2, run.strategy, run.ema, {"try": 2}, samples_seen=16)
    wanted = [owned.tensor.clone() for owned in run.strategy.local_params()]
    run.train(1)
    assert manager.restore_latest(run.strategy, run.ema) == {"try": 2}
    assert all(
        torch.equal(a.tensor, b) for a, b in zip(run.strategy.local_params(), wanted, strict=True)
    )
    assert run.strategy.optimizer_steps == 2


def test_leftovers_of_interrupted_saves_are_removed(tmp_path, run):
    manager = make_manager(tmp_path)
    for name in (".writing_step_00000009", ".removing_step_00000003"):
        (manager.run_dir.checkpoints / name).mkdir(parents=True)
        (manager.run_dir.checkpoints / name / "manifest.json").write_text("{}")
    assert manager.restore_latest(run.strategy, run.ema) is None
    assert not list(manager.run_dir.checkpoints.iterdir())


def test_the_manifest_is_written_last_and_then_the_folder_is_renamed(tmp_path, run, monkeypatch):
    """An error before that leaves no files behind.  It is a SaveError, so that the launcher tries
    again.
    """
    manager = make_manager(tmp_path)

    def crash(*args):
        raise OSError("pulled the plug")

    monkeypatch.setattr(manager_module, "merge_parts", crash)
    with pytest.raises(
        CheckpointError, match="step_00000001: cannot be published: OSError: pulled the plug"
    ):
        manager.save(1, run.strategy, run.ema, {}, samples_seen=16)
    assert not list(manager.run_dir.checkpoints.iterdir())
    monkeypatch.undo()
    files_before = []
    monkeypatch.setattr(
        Manifest,
        "write",
        lambda self, folder: crash(files_before.extend(path.name for path in folder.iterdir())),
    )
    with pytest.raises(SaveError, match="pulled the plug") as caught:
        manager.save(1, run.strategy, run.ema, {}, samples_seen=16)
    assert sorted(files_before) == ["index.json", "pieces_00000.safetensors", "state.json"]
    assert not list(manager.run_dir.checkpoints.iterdir())
    monkeypatch.setattr(CheckpointManager, "_create", crash)
    with pytest.raises(
        SaveError, match="step_00000001_.*: cannot be made: OSError: pulled the plug"
    ):
        manager.save(1, run.strategy, run.ema, {}, samples_seen=16)
    assert caught.value.status == 1


class ProcessExit(Exception):
    """Stands for the exit of a process."""


def exit_process():
    raise ProcessExit


def test_a_process_that_lost_its_lease_neither_removes_nor_publishes(tmp_path, run, monkeypatch):
    """The manager checks its ownership before a save and again at the end of one."""
    new = make_manager(tmp_path)
    old = make_manager(tmp_path)
    new.save(1, run.strategy, run.ema, {"of": "the new process"}, samples_seen=16)
    with monkeypatch.context() as patch:
        patch.setattr(
            Manifest,
            "write",
            lambda *args, real=Manifest.write: (
                real(*args),
                setattr(old, "check_ownership", exit_process),
            ),
        )
        with pytest.raises(
            CheckpointError, match="step_00000001: cannot be published: ProcessExit"
        ):
            old.save(1, run.strategy, run.ema, {"of": "the old process"}, samples_seen=16)
    in_progress = new.run_dir.checkpoints / ".writing_step_00000002_0123abcd"
    in_progress.mkdir()
    with pytest.raises(CheckpointError, match="ProcessExit"):
        old.save(1, run.strategy, run.ema, {"of": "the old process"}, samples_seen=16)
    assert in_progress.is_dir() and new.restore_latest(run.strategy, run.ema) == {
        "of": "the new process"
    }


def test_two_processes_write_the_same_step_into_different_folders(tmp_path, run):
    """The first one was suspended, and the second one has taken over the run."""
    names = []
    for manager in (make_manager(tmp_path), make_manager(tmp_path)):
        manager.check_ownership = lambda: names.append(
            [path.name for path in tmp_path.glob("checkpoints/.writing_*")]
        )
        manager.save(1, run.strategy, run.ema, {}, samples_seen=16)
    (first,), (second,) = (folders for folders in names if folders)
    assert first != second


@pytest.mark.parametrize(
    "corrupt, message",
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
def test_corruption_is_described(tmp_path, run, corrupt, message):
    folder = make_manager(tmp_path).save(1, run.strategy, run.ema, {}, samples_seen=16)
    corrupt(folder)
    assert message in find_corruption(folder)


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path, run):
    """Such as one that was copied from another run."""
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
    folder = make_manager(tmp_path).save(1, run.strategy, run.ema, {}, samples_seen=16)
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**content, "format": 1}))
    with pytest.raises(
        CheckpointError,
        match="checkpoint format 1, this version reads 2 and 3: go on with the version "
        "that saved it",
    ):
        make_manager(tmp_path).restore_latest(run.strategy, run.ema)


def saved(folder, run, *steps, **options):
    manager = make_manager(folder, **{"keep_last": 9, **options})
    for step in steps:
        manager.save(step, run.strategy, run.ema, {"step": step}, samples_seen=step * 16)
    return manager


def test_a_resume_skips_damaged_checkpoints(tmp_path, run, caplog):
    """Damaged are a renamed folder and an index that was edited with all its hashes.  When no other
    checkpoint is left, the run does not start.
    """
    manager = saved(tmp_path, run, 1, 2, 3)
    manager.run_dir.checkpoint(3).rename(manager.run_dir.checkpoint(7))
    edit(manager.run_dir.checkpoint(2), "index.json", lambda index: index.pop("ema") and None)
    (manager.run_dir.checkpoints / "step_00000009").mkdir()
    assert manager.restore_latest(run.strategy, run.ema) == {"step": 1}
    for message in (
        "step_00000009: is no complete checkpoint",
        "step_00000007: passed over",
        "step_00000002: passed over",
    ):
        assert message in caplog.text
    edit(
        manager.run_dir.checkpoint(1),
        "manifest.json",
        lambda content: content.update(optimizer_steps=-1),
    )
    with pytest.raises(CheckpointError, match="all 3 checkpoints are damaged"):
        manager.restore_latest(run.strategy, run.ema)


@pytest.mark.parametrize("name", ["step_00000001", "step_1", "step_00000001_old"])
def test_a_run_does_not_start_again_beside_a_broken_checkpoint(tmp_path, run, name):
    manager = saved(tmp_path, run, 1)
    folder = manager.run_dir.checkpoint(1)
    if name == folder.name:
        (folder / "manifest.json").unlink()
    folder.rename(folder.with_name(name))
    with pytest.raises(
        CheckpointError, match=f"holds {name} and no complete checkpoint: bring one back, or remove"
    ):
        manager.restore_latest(run.strategy, run.ema)


def test_a_training_run_needs_its_complete_state(tmp_path, run):
    manager = saved(tmp_path, run, 1)
    assert manager.restore_latest(run.strategy, run.ema) == {"step": 1}
    manager.samples_per_step = 16
    with pytest.raises(CheckpointError, match="all 1 checkpoints are damaged"):
        manager.restore_latest(run.strategy, run.ema)


def test_damaged_checkpoints_do_not_displace_sound_ones(tmp_path, run):
    """Three checkpoints are damaged: a truncated one, one whose damage a resume has detected, and a
    copy under the name of a much later step.
    """
    manager = saved(tmp_path, run, 1, 2, 3, 4)
    folder = manager.run_dir
    flip_bit(folder.checkpoint(4) / "pieces_00000.safetensors")
    (folder.checkpoint(3) / "state.json").write_text("")
    shutil.copytree(folder.checkpoint(1), folder.checkpoint(99))
    manager = make_manager(tmp_path, keep_last=2)
    assert manager.restore_latest(run.strategy, run.ema) == {"step": 2}
    manager.save(5, run.strategy, run.ema, {"step": 5}, samples_seen=80)
    assert folder.complete_checkpoints() == [2, 3, 4, 5, 99]
    manager.save(4, run.strategy, run.ema, {"step": 4}, samples_seen=64)
    assert folder.complete_checkpoints() == [4, 5, 99], "the step was saved again and counts again"
    assert manager.restore_latest(run.strategy, run.ema) == {"step": 5}


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_linked_checkpoint_is_removed_as_a_link(tmp_path, run):
    manager = saved(tmp_path / "run", run, 1, 2)
    first, elsewhere = manager.run_dir.checkpoint(1), tmp_path / "elsewhere" / "step_00000001"
    elsewhere.parent.mkdir()
    first.rename(elsewhere)
    first.symlink_to(elsewhere)
    saved(tmp_path / "run", run, 3, keep_last=1)
    assert manager.run_dir.complete_checkpoints() == [3] and find_corruption(elsewhere) is None
    assert [path.name for path in manager.run_dir.checkpoints.iterdir()] == ["step_00000003"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"step": "2"}', '{"step": -1}', "null", '{"metric": "fid"}']
)
def test_a_damaged_best_file_does_not_fail_a_save(tmp_path, run, caplog, content):
    """A warning names it; the step comes from the records; without them none is protected."""
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


def test_invalid_leases_do_not_fail_a_save(tmp_path, run):
    folder = RunDir(tmp_path)
    folder.evaluation_lease(1, "a").mkdir(parents=True)
    folder.evaluation_lease(1, "b").write_text("")
    folder.evaluation_lease(1, "c").symlink_to("nowhere")
    saved(tmp_path, run, 1, 2, keep_last=1)
    assert folder.complete_checkpoints() == [2]
