"""Whether a run can begin or go on: the same answer on the login node and on every rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lpl_pretrain.config.dataset import INDEX_NAME
from lpl_pretrain.config.hashing import autoencoder_identity
from lpl_pretrain.config.load import dump, resolve_path
from lpl_pretrain.config.resume import check_start, finished
from lpl_pretrain.config.rundir import MANIFEST, RunDir
from lpl_pretrain.errors import ConfigError
from tests.support.configs import dataset_index, train_config

ROOT = Path(__file__).resolve().parents[3]
INDEX = dataset_index(identity=autoencoder_identity(resolve_path("asset:autoencoder_emoji")))


def save_manifest(run_dir: RunDir, step: int) -> None:
    """A checkpoint of one file of 5 bytes, as `finished` sees it."""
    folder = run_dir.checkpoint(step)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_bytes(b"12345")
    (folder / MANIFEST).write_text('{"files": {"state.json": {"bytes": 5}}}')


def begin(run_dir: RunDir, config) -> None:
    run_dir.checkpoint(3).mkdir(parents=True)
    save_manifest(run_dir, 3)
    run_dir.config.write_text(dump(config))


def test_where_first_weights_came_from_is_asked_once(tmp_path):
    """A run that has begun needs them no more; one that has not does."""
    config, run_dir = (
        train_config(init_from={"run": str(tmp_path / "gone")}),
        RunDir(tmp_path / "run"),
    )
    with pytest.raises(ConfigError, match="init_from.run=.*gone: .*no complete checkpoint"):
        check_start(config, run_dir, INDEX, 1)
    begin(run_dir, config)
    check_start(config, run_dir, INDEX, 1)


def test_another_run_is_refused(tmp_path):
    run_dir = RunDir(tmp_path)
    begin(run_dir, train_config())
    with pytest.raises(ConfigError, match="seed: the run has 0, you ask for 1"):
        check_start(train_config(seed=1), run_dir, INDEX, 1)


def test_the_login_node_asks_the_same(tmp_path):
    """`launch train`, with and without the checkpoint that makes a run one that was begun."""
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / INDEX_NAME).write_text(INDEX.model_dump_json())
    (tmp_path / "cluster.yaml").write_text("{}")
    changes = {
        "init_from": {"run": str(tmp_path / "gone")},
        "data__folder": str(tmp_path / "latents"),
    }
    config, run_dir = train_config(**changes), RunDir(tmp_path / "run")
    (tmp_path / "train.yaml").write_text(dump(config))
    options = ["--cluster", tmp_path / "cluster.yaml", "--dry-run"]
    command = [
        sys.executable,
        "-m",
        "launch",
        "train",
        tmp_path / "train.yaml",
        f"run_dir={run_dir.path}",
        *options,
    ]

    def launch():
        return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)

    assert (refused := launch()).returncode == 2 and "no complete checkpoint" in refused.stderr
    begin(run_dir, config)
    assert (shown := launch()).returncode == 0 and "#SBATCH" in shown.stdout, shown.stderr


def log_a_step(run_dir: RunDir) -> None:
    run_dir.metrics.write_text(
        '{"event": "update_left_out", "step": 1}\n{"step": 1, "loss/total": 1.0}\n{"ste'
    )


def test_a_run_that_never_made_a_step_takes_a_corrected_configuration(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.config.write_text(dump(train_config()))
    run_dir.metrics.write_text('{"event": "update_left_out", "step": 1}\n')  # an event is no step
    check_start(train_config(seed=1, steps=9, model__width=64), run_dir, INDEX, 1)
    run_dir.config.write_text("{ cut by")
    check_start(train_config(seed=1), run_dir, INDEX, 1)


def test_one_that_logged_steps_and_saved_none_does_not(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.config.write_text(dump(train_config()))
    log_a_step(run_dir)
    check_start(train_config(), run_dir, INDEX, 1)
    with pytest.raises(
        ConfigError,
        match="(?s)seed: the run has 0, you ask for 1.*saved no checkpoint: remove the folder",
    ):
        check_start(train_config(seed=1), run_dir, INDEX, 1)


def test_a_run_of_another_name_is_not_replaced(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.config.write_text(dump(train_config(name="other")))
    with pytest.raises(
        ConfigError,
        match="belongs to run 'other', which made no step yet; you start 'tiny': name "
        "another folder",
    ):
        check_start(train_config(), run_dir, INDEX, 1)


def test_no_run_begins_among_data(tmp_path):
    (tmp_path / INDEX_NAME).write_text("{}")
    with pytest.raises(ConfigError, match="run_dir=.*: holds data .*: name another one"):
        check_start(train_config(), RunDir(tmp_path), INDEX, 1)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"steps": 3}, "complete: 3 of 3 steps; nothing to do (raise steps to go on)"),
        (
            {"steps": 2},
            "complete: it has made 3 steps, and steps=2 asks for no more; nothing to do",
        ),
        ({"steps": 4}, None),
        (
            {"steps": 3, "parallel__strategy": "fsdp2"},
            "complete: 3 of 3 steps; nothing to do (raise steps to go on)",
        ),
    ],
)
def test_a_finished_run(tmp_path, changes, words):
    run_dir = RunDir(tmp_path)
    assert finished(train_config(**changes), run_dir) is None
    begin(run_dir, train_config(steps=3))
    assert finished(train_config(**changes), run_dir) == words


def test_a_finished_run_of_another_configuration_is_refused(tmp_path):
    run_dir = RunDir(tmp_path)
    cosine = {"optimizer__lr_schedule": "cosine", "optimizer__warmup_steps": 1}
    begin(run_dir, train_config(steps=3, **cosine))
    assert "a longer run is a new one" in (finished(train_config(steps=3, **cosine), run_dir) or "")
    with pytest.raises(ConfigError, match="steps: the run has 3, you ask for 2"):
        finished(train_config(steps=2, **cosine), run_dir)
    with pytest.raises(ConfigError, match="seed: the run has 0, you ask for 1"):
        finished(train_config(steps=3, seed=1, **cosine), run_dir)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: (folder / "state.json").write_bytes(b"1234"),
        lambda folder: (folder / MANIFEST).write_bytes(b""),
        lambda folder: (folder / MANIFEST).write_text("[]"),
        lambda folder: (folder / MANIFEST).write_text('{"files": {"state.json": 3}}'),
    ],
    ids=["file missing", "file cut", "manifest empty", "manifest a list", "record a number"],
)
def test_a_run_whose_last_checkpoint_lost_files_is_not_finished(tmp_path, damage):
    """The run resumes from the checkpoint before, which the same run with fewer steps ends at."""
    run_dir = RunDir(tmp_path)
    begin(run_dir, train_config(steps=6))
    save_manifest(run_dir, 6)
    assert finished(train_config(steps=6), run_dir) is not None
    damage(run_dir.checkpoint(6))
    assert finished(train_config(steps=6), run_dir) is None
    assert run_dir.last_intact_step() == 3
    assert "3 of 3 steps" in (finished(train_config(steps=3), run_dir) or "")
