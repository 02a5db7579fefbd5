"""Checkpoints move between strategies and world sizes; the same layout resumes bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lpl_pretrain.checkpoint import manager as manager_module
from lpl_pretrain.checkpoint.manager import CheckpointManager
from lpl_pretrain.checkpoint.state import read_state
from lpl_pretrain.checkpoint.store import load_full
from lpl_pretrain.checkpoint.weights import read_weights
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import CheckpointConfig
from lpl_pretrain.errors import CheckpointError, SaveError
from lpl_pretrain.runtime.dist import barrier
from tests.support.checkpoints import edit, rewrite_manifest
from tests.support.ranks import run_ranks
from tests.support.training import Case, Training, assert_identical, join_ranks, train_one_process

STRATEGIES = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
SAVED, MORE = 2, 2
CASE = Case(optimizer="adamw", precision="fp32", lr=0.01, grad_accum_steps=2, max_grad_norm=0.5)


def manager(folder: str | Path, **options) -> CheckpointManager:
    """Checkpoint manager with synchronous saves, unless `options` change that."""
    return CheckpointManager(
        RunDir(Path(folder)), CheckpointConfig(**{"asynchronous": False, **options})
    )


def save_and_continue(world, device, case, folder):
    """Train, save and train on: (state at the checkpoint, state MORE steps later)."""
    run = Training(world, device, case).train(SAVED)
    manager(folder).save(
        SAVED, run.strategy, run.ema, {"step": SAVED, "who": "trainer"}, samples_seen=SAVED * 16
    )
    return run.result(), run.train(MORE).result()


def resume(world, device, case, folder):
    """Restore into a run with other weights, train on: (restored state, state MORE steps later)."""
    run = Training(world, device, case, seed=100)
    state = manager(folder).restore_latest(run.strategy, run.ema)
    assert state == {"step": SAVED, "who": "trainer"}
    restored = run.result()
    run.step = SAVED
    return restored, run.train(MORE).result()


def save_and_resume(world, device, case, folder):
    return [*save_and_continue(world, device, case, folder), *resume(world, device, case, folder)]


def join_columns(results):
    return map(join_ranks, zip(*results, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "strategy", [*STRATEGIES, "zero0", "zero2_offload", "zero3_offload", "zero3_shipped"]
)
def test_same_layout_resumes_bit_for_bit(strategy, precision, tmp_path):
    """Parameters, moments and EMA; under bf16 the float32 master weights."""
    saved, continued, restored, resumed = join_columns(
        run_ranks(
            2, save_and_resume, replace(CASE, strategy=strategy, precision=precision), tmp_path
        )
    )
    assert {"param", "ema", "optimizer.exp_avg", "optimizer.exp_avg_sq"} < saved.keys()
    assert_identical(restored, saved)
    assert_identical(resumed, continued)
    with pytest.raises(AssertionError):
        assert_identical(resumed, saved)


def test_float64_and_plain_sgd_resume_bit_for_bit(tmp_path):
    case = replace(CASE, strategy="fsdp2", precision="fp64", optimizer="sgd")
    saved, continued, restored, resumed = join_columns(
        run_ranks(2, save_and_resume, case, tmp_path)
    )
    assert saved["param"]["head.weight"].dtype == torch.float64
    assert_identical(restored, saved)
    assert_identical(resumed, continued)


def test_muon_resumes_bit_for_bit_and_moves(tmp_path):
    """Each parameter has either Muon's momentum or AdamW's moments."""
    case = replace(CASE, strategy="fsdp2", optimizer="muon")
    saved, continued, restored, resumed = join_columns(
        run_ranks(2, save_and_resume, case, tmp_path)
    )
    assert saved["optimizer.momentum_buffer"].keys().isdisjoint(saved["optimizer.exp_avg"])
    assert_identical(restored, saved)
    assert_identical(resumed, continued)
    moved, _ = join_columns(
        run_ranks(3, resume, replace(case, strategy="ddp", grad_accum_steps=1), tmp_path)
    )
    assert_identical(moved, saved)


MOVES = [
    ("fsdp2", 2, "fsdp2", 1),
    ("fsdp2", 1, "fsdp2", 2),
    ("zero1", 2, "zero1", 1),
    ("zero2", 2, "zero2", 1),
    ("zero3", 2, "zero3", 1),
    ("zero3", 1, "zero3", 2),
    ("zero2", 2, "fsdp2", 2),
    ("ddp", 2, "zero3", 2),
    ("zero3", 2, "ddp", 2),
    ("zero3_offload", 2, "zero0", 2),
    ("zero0", 2, "zero2_offload", 2),
    ("fsdp2", 3, "zero1", 2),
]


@pytest.mark.parametrize("source, source_size, target, target_size", MOVES)
def test_moves_to_another_layout(source, source_size, target, target_size, tmp_path):
    """The restored state is exact; later steps differ by the order of float32 sums."""
    # 3 ranks do not divide the batch: only the restored state is compared
    options = {"grad_accum_steps": 1} if source_size == 3 else {}
    saved, continued = join_columns(
        run_ranks(
            source_size, save_and_continue, replace(CASE, strategy=source, **options), tmp_path
        )
    )
    restored, resumed = join_columns(
        run_ranks(target_size, resume, replace(CASE, strategy=target), tmp_path)
    )
    assert_identical(restored, saved)
    if source_size != 3:
        for kind in ("param", "ema"):
            for name, tensor in continued[kind].items():
                torch.testing.assert_close(resumed[kind][name], tensor, rtol=1e-5, atol=2e-6)


LAYOUTS = [(strategy, world_size) for strategy in STRATEGIES for world_size in (1, 2, 4)] + [
    ("hsdp", 4)
]


def layout(strategy):
    return (
        replace(CASE, strategy="fsdp2", more=(("shard_size", 2),))
        if strategy == "hsdp"
        else replace(CASE, strategy=strategy)
    )


@pytest.fixture(scope="module")
def saved_by_all(tmp_path_factory):
    """Checkpoints of all layouts: {(strategy, world size): (folder, its state, state later)}."""
    saved = {}
    for strategy, world_size in LAYOUTS:
        folder = tmp_path_factory.mktemp(f"{strategy}_{world_size}")
        saved[strategy, world_size] = (
            folder,
            *join_columns(run_ranks(world_size, save_and_continue, layout(strategy), folder)),
        )
    return saved


def test_the_ema_exported_from_every_layout_equals_that_of_one_process(saved_by_all):
    wanted = train_one_process(replace(CASE, strategy="local", grad_accum_steps=1), steps=SAVED)[
        "ema"
    ]
    for folder, _, _ in saved_by_all.values():
        exported, metadata = read_weights(RunDir(folder), "ema", None)
        assert exported.keys() == wanted.keys() and metadata == {
            "weights": "ema",
            "step": str(SAVED),
        }
        for name, tensor in wanted.items():
            torch.testing.assert_close(exported[name], tensor, rtol=1e-6, atol=1e-6)


def resume_each(world, device, case, folders):
    return [resume(world, device, case, folder) for folder in folders]


@pytest.mark.parametrize(("strategy", "world_size"), LAYOUTS)
def test_resumes_from_the_checkpoint_of_every_layout(saved_by_all, strategy, world_size):
    """The restored state is exact for all pairs of layouts; the same layout resumes bit for bit."""
    folders = [str(folder) for folder, _, _ in saved_by_all.values()]
    by_rank = run_ranks(world_size, resume_each, layout(strategy), folders)
    for source, results in zip(saved_by_all, zip(*by_rank, strict=True), strict=True):
        _, saved, continued = saved_by_all[source]
        restored, resumed = join_columns(results)
        assert_identical(restored, saved)
        if source == (strategy, world_size):
            assert_identical(resumed, continued)
        losses = continued["losses"]["losses"][SAVED:]
        assert len(losses) == MORE
        torch.testing.assert_close(resumed["losses"]["losses"], losses, rtol=1e-6, atol=0)
        for kind in ("param", "ema", "ema_power_0.050"):
            for name, tensor in continued[kind].items():
                torch.testing.assert_close(resumed[kind][name], tensor, rtol=1e-5, atol=2e-6)


def test_one_process_reads_and_resumes_any_checkpoint(tmp_path):
    saved, _ = join_columns(
        run_ranks(2, save_and_continue, replace(CASE, strategy="zero3"), tmp_path)
    )
    folder = RunDir(tmp_path).checkpoint(SAVED)
    for kind in ("param", "ema", "optimizer.exp_avg"):
        full = load_full(folder, kind)
        assert full.keys() == saved[kind].keys() and all(
            torch.equal(full[name], tensor) for name, tensor in saved[kind].items()
        )
    assert read_state(folder) == {"step": SAVED, "who": "trainer"}
    restored, _ = join_columns(run_ranks(1, resume, replace(CASE, strategy="local"), tmp_path))
    assert_identical(restored, saved)
    with pytest.raises(
        CheckpointError,
        match="has no 'optimizer.momentum', only \\['ema', 'ema_power_0.050', "
        ".*'optimizer.exp_avg'",
    ):
        load_full(folder, "optimizer.momentum")


def test_another_optimizer_is_refused(tmp_path):
    run_ranks(2, save_and_continue, replace(CASE, strategy="ddp", optimizer="sgd"), tmp_path)
    with pytest.raises(
        AssertionError, match="CheckpointError.*has no 'optimizer.exp_avg', only .*optimizer.kind"
    ):
        run_ranks(2, resume, replace(CASE, strategy="ddp"), tmp_path)


def crashes_while_saving(world, device, folder):
    """Fail in rank 1's write of the second save, then in rank 0's publication of the third."""
    run = Training(world, device, replace(CASE, strategy="fsdp2"))
    keeper, messages = manager(folder), []
    keeper.save(0, run.strategy, run.ema, {"step": 0}, samples_seen=0 * 16)
    for step, name, rank in ((1, "write_rank", 1), (2, "merge_parts", 0)):
        run.train(1)
        with pytest.MonkeyPatch.context() as patch:
            if world.rank == rank:
                patch.setattr(manager_module, name, _no_space)
            with pytest.raises(SaveError) as caught:
                keeper.save(step, run.strategy, run.ema, {"step": step}, samples_seen=step * 16)
        messages.append(str(caught.value))
    barrier()
    left = sorted(path.name for path in keeper.run_dir.checkpoints.iterdir())
    state = keeper.restore_latest(run.strategy, run.ema)
    return messages, left, state, sorted(path.name for path in keeper.run_dir.checkpoints.iterdir())


def _no_space(*args):
    raise OSError(28, "No space left on device")


def test_a_failed_save_keeps_the_last_checkpoint(tmp_path):
    results = run_ranks(2, crashes_while_saving, tmp_path)
    assert results[0] == results[1], "ranks raised different errors"
    messages, left, state, finally_left = results[0]
    assert all("No space left on device" in message for message in messages)
    assert left == ["step_00000000"]
    assert state == {"step": 0} and finally_left == ["step_00000000"]


def restores(world, device, folder):
    """Restore: (state or error message, warnings)."""
    run, warnings = Training(world, device, replace(CASE, strategy="zero2")), []
    manager_module.log.addFilter(lambda record: warnings.append(record.getMessage()))
    try:
        return manager(folder).restore_latest(run.strategy, run.ema), warnings
    except CheckpointError as error:
        return str(error), warnings


def saves_three(world, device, folder):
    run = Training(world, device, replace(CASE, strategy="zero2"))
    for step in (1, 2, 3):
        run.train(1)
        manager(folder).save(step, run.strategy, run.ema, {"step": step}, samples_seen=step * 16)


def test_corrupt_checkpoints_are_passed_over(tmp_path):
    """A flipped bit, a truncated file, an unknown format, no manifest: all ranks agree."""
    run_ranks(2, saves_three, tmp_path)

    def restored() -> Any:
        answers = run_ranks(2, restores, tmp_path)
        assert answers[0] == answers[1]
        return answers[0]

    newest, middle, oldest = (RunDir(tmp_path).checkpoint(step) for step in (3, 2, 1))
    file = newest / "pieces_00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    state, warnings = restored()
    assert state == {"step": 2} and "DAMAGED CHECKPOINT step_00000003" in warnings[0]
    assert "pieces_00001.safetensors: its sha256 is not the manifest's" in warnings[0]
    (middle / "state.json").write_text("{")
    assert restored()[0] == {"step": 1}
    manifest = json.loads((oldest / "manifest.json").read_text())
    (oldest / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    assert "checkpoint format 99, this version reads 2 and 3: update lpl_pretrain" in restored()[0]
    (oldest / "manifest.json").write_text("{")
    assert "all 3 checkpoints are damaged" in restored()[0]
    (oldest / "manifest.json").unlink()
    assert "all 2 checkpoints are damaged" in restored()[0]


def test_corruption_that_one_rank_detects_is_passed_over_by_all(tmp_path):
    """One rank reads a header that contradicts the index; all digests are valid."""
    run_ranks(2, saves_three, tmp_path)
    newest, middle = (RunDir(tmp_path).checkpoint(step) for step in (3, 2))
    path = newest / "pieces_00001.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first = next(iter(header))
    renamed = {f"{key}_" if key == first else key: entry for key, entry in header.items()}
    text = json.dumps(renamed).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    rewrite_manifest(newest)
    content = json.loads((middle / "manifest.json").read_text())
    del content["digest"]
    (middle / "manifest.json").write_text(json.dumps({**content, "format": 2}))
    answers = run_ranks(2, restores, tmp_path)
    assert answers[0] == answers[1]
    state, warnings = answers[0]
    assert state == {"step": 2}, "format 2 is still read"
    assert (
        "pieces_00001.safetensors: holds" in warnings[0]
        and "which index.json does not expect there" in warnings[0]
    )
    edit(middle, "manifest.json", lambda content: content.update(identity="1" * 64, format=3))
    refused = run_ranks(2, restores, tmp_path)
    assert (
        refused[0] == refused[1]
        and "was saved by a run with another configuration" in refused[0][0]
    )
