"""Asynchronous checkpoints: they hold the state at the call of save; errors reach all ranks."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lpl_pretrain.checkpoint import manager as manager_module
from lpl_pretrain.checkpoint.manager import CheckpointManager
from lpl_pretrain.checkpoint.staging import HostCopies
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import CheckpointConfig
from lpl_pretrain.errors import CheckpointError
from lpl_pretrain.runtime.dist import any_over_ranks
from tests.support.ranks import run_ranks
from tests.support.training import Case, Training, assert_identical, join_ranks

CASE = Case(optimizer="adamw", precision="fp32", lr=0.01, max_grad_norm=0.5)


def manager(folder: Path, **options) -> CheckpointManager:
    return CheckpointManager(RunDir(folder), CheckpointConfig(**options))


WRITE_AT, PUBLISH_AT = 3, 6
"""Steps after the call of save at which the background thread may write, and then publish."""


def after(event, function):
    """`function`, delayed until `event` is set."""

    def call(*args):
        assert event.wait(60), "training waits for the disk"
        return function(*args)

    return call


def saves_while_training(world, device, case, folder, forgets_to_copy):
    """Train while a save runs that can finish only after PUBLISH_AT more steps.

    Returns (state at the call of save, restored state, steps made meanwhile).
    """
    run = Training(world, device, case).train(2)
    checkpoints = manager(folder)
    may_write, may_publish = threading.Event(), threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager_module, "write_rank", after(may_write, manager_module.write_rank))
        patch.setattr(manager_module, "merge_parts", after(may_publish, manager_module.merge_parts))
        if forgets_to_copy:
            patch.setattr(HostCopies, "copy", lambda self, entries, device: list(entries))
        wanted = run.result()
        checkpoints.save(2, run.strategy, run.ema, {"step": 2}, samples_seen=32)
        steps = 0
        while checkpoints.saving:
            run.train(1)
            steps += 1
            if steps == WRITE_AT:
                may_write.set()
            if steps == PUBLISH_AT:
                may_publish.set()
            if not any_over_ranks(checkpoints.busy)[0]:
                checkpoints.advance()
    other = Training(world, device, case, seed=100)
    assert manager(folder).restore_latest(other.strategy, other.ema) == {"step": 2}
    return wanted, other.result(), steps


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_the_checkpoint_holds_the_state_at_the_call(strategy, tmp_path):
    results = run_ranks(2, saves_while_training, replace(CASE, strategy=strategy), tmp_path, False)
    wanted, restored, steps = zip(*results, strict=True)
    assert_identical(join_ranks(restored), join_ranks(wanted))
    assert steps[0] == steps[1] >= PUBLISH_AT


def test_has_teeth_without_a_copy(tmp_path):
    wanted, restored, _ = zip(
        *run_ranks(2, saves_while_training, replace(CASE, strategy="fsdp2"), tmp_path, True),
        strict=True,
    )
    with pytest.raises(AssertionError):
        assert_identical(join_ranks(restored), join_ranks(wanted))


def saves_twice(world, device, folder):
    """Save twice in a row; complete checkpoints after the second call, at the end, all folders."""
    run = Training(world, device, replace(CASE, strategy="ddp"))
    checkpoints = manager(folder, keep_last=1)
    plain_write, may_write = manager_module.write_rank, threading.Event()
    steps_written = iter((1, 2))

    def write(*args):
        if next(steps_written) == 1:
            time.sleep(0.1)  # most likely still running when the second save begins
        else:
            assert may_write.wait(60)  # not finished when `first` is listed
        return plain_write(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager_module, "write_rank", write)
        for step in (1, 2):
            run.train(1)
            checkpoints.save(step, run.strategy, run.ema, {"step": step}, samples_seen=16 * step)
        first = checkpoints.run_dir.complete_checkpoints()
        may_write.set()
        checkpoints.finish()
    return (
        first,
        checkpoints.run_dir.complete_checkpoints(),
        sorted(path.name for path in checkpoints.run_dir.checkpoints.iterdir()),
    )


def test_a_save_waits_for_the_previous_one(tmp_path):
    for first, last, names in run_ranks(2, saves_twice, tmp_path):
        assert (first, last, names) == ([1], [2], ["step_00000002"])


def fails_on_a_thread(world, device, folder):
    """Fail in rank 1's write, then in rank 0's publication; the third save works.

    Returns (error messages that the main thread raised, complete checkpoints).
    """
    run = Training(world, device, replace(CASE, strategy="fsdp2"))
    checkpoints = manager(folder)
    messages = []
    for step, name, rank in ((1, "write_rank", 1), (2, "merge_parts", 0)):
        with pytest.MonkeyPatch.context() as patch:
            if world.rank == rank:
                patch.setattr(manager_module, name, _no_space)
            checkpoints.save(step, run.strategy, run.ema, {}, samples_seen=0)
            with pytest.raises(CheckpointError) as caught:
                checkpoints.finish()
        messages.append(str(caught.value))
    checkpoints.save(3, run.strategy, run.ema, {}, samples_seen=0)
    checkpoints.finish()
    return messages, checkpoints.run_dir.complete_checkpoints()


def _no_space(*args):
    raise OSError(28, "No space left on device")


def test_an_error_on_a_thread_is_raised_on_all_ranks(tmp_path):
    results = run_ranks(2, fails_on_a_thread, tmp_path)
    assert results[0] == results[1]
    messages, complete = results[0]
    assert (
        "cannot be written: OSError: [Errno 28] No space left" in messages[0]
        and "cannot be published" in messages[1]
    )
    assert complete == [3]
