"""Asynchronous checkpoints: they hold the state at the call of save; errors reach all ranks."""

from __future__ import annotations

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


def slow(function, seconds=0.3):
    def later(*args):
        time.sleep(seconds)
        return function(*args)

    return later


def saves_while_training(world, device, case, folder, forgets_to_copy):
    """Train while a slow save runs.

    Returns (state at the call of save, restored state, steps made meanwhile, seconds of save).
    """
    run, keeper = Training(world, device, case).train(2), manager(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager_module, "write_rank", slow(manager_module.write_rank))
        patch.setattr(manager_module, "merge_parts", slow(manager_module.merge_parts))
        if forgets_to_copy:
            patch.setattr(HostCopies, "copy", lambda self, entries, device: list(entries))
        wanted, asked = run.result(), time.monotonic()
        keeper.save(2, run.strategy, run.ema, {"step": 2}, samples_seen=32)
        stall, steps = time.monotonic() - asked, 0
        while keeper.saving:
            run.train(1)
            steps += 1
            if not any_over_ranks(keeper.busy)[0]:
                keeper.advance()
    other = Training(world, device, case, seed=100)
    assert manager(folder).restore_latest(other.strategy, other.ema) == {"step": 2}
    return wanted, other.result(), steps, stall


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_the_checkpoint_holds_the_state_at_the_call(strategy, tmp_path):
    results = run_ranks(2, saves_while_training, replace(CASE, strategy=strategy), tmp_path, False)
    wanted, restored, steps, stall = zip(*results, strict=True)
    assert_identical(join_ranks(restored), join_ranks(wanted))
    assert steps[0] == steps[1] > 2, "training waited for the disk"
    assert max(stall) < 0.3, "save waited for the disk"


def test_has_teeth_without_a_copy(tmp_path):
    wanted, restored, _, _ = zip(
        *run_ranks(2, saves_while_training, replace(CASE, strategy="fsdp2"), tmp_path, True),
        strict=True,
    )
    with pytest.raises(AssertionError):
        assert_identical(join_ranks(restored), join_ranks(wanted))


def saves_twice(world, device, folder):
    """Save twice in a row; complete checkpoints after the second call, at the end, all folders."""
    run, keeper = (
        Training(world, device, replace(CASE, strategy="ddp")),
        manager(folder, keep_last=1),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager_module, "write_rank", slow(manager_module.write_rank, 0.1))
        for step in (1, 2):
            run.train(1)
            keeper.save(step, run.strategy, run.ema, {"step": step}, samples_seen=16 * step)
        first = keeper.run_dir.complete_checkpoints()
        keeper.finish()
    return (
        first,
        keeper.run_dir.complete_checkpoints(),
        sorted(path.name for path in keeper.run_dir.checkpoints.iterdir()),
    )


def test_a_save_waits_for_the_previous_one(tmp_path):
    for first, last, names in run_ranks(2, saves_twice, tmp_path):
        assert (first, last, names) == ([1], [2], ["step_00000002"])


def fails_on_a_thread(world, device, folder):
    """Fail in rank 1's write, then in rank 0's publication; the third save works.

    Returns (error messages that the main thread raised, complete checkpoints).
    """
    run, keeper, messages = (
        Training(world, device, replace(CASE, strategy="fsdp2")),
        manager(folder),
        [],
    )
    for step, name, rank in ((1, "write_rank", 1), (2, "merge_parts", 0)):
        with pytest.MonkeyPatch.context() as patch:
            if world.rank == rank:
                patch.setattr(manager_module, name, _no_space)
            keeper.save(step, run.strategy, run.ema, {}, samples_seen=0)
            with pytest.raises(CheckpointError) as caught:
                keeper.finish()
        messages.append(str(caught.value))
    keeper.save(3, run.strategy, run.ema, {}, samples_seen=0)
    keeper.finish()
    return messages, keeper.run_dir.complete_checkpoints()


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
